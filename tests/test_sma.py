"""lic_fast.optim.SMA: the wrapper around any optimizer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import lic_fast
from lic_fast.optim import SMA

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
}


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)


def loss_of(net, step):
    g = torch.Generator().manual_seed(step)
    p = next(net.parameters())
    x, y = torch.randn(8, 5, generator=g).to(p.dtype), torch.randn(8, 3, generator=g).to(p.dtype)
    return (net(x) - y).square().mean()


def train(net, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def lookahead(net, optimizer, steps, alpha, every, reset):
    """SMA written by hand in fp64 arithmetic on top of the plain optimizer."""
    slow = [p.detach().clone() for p in net.parameters()]
    for step in range(steps):
        train(net, optimizer, 1, step)
        if (step + 1) % every == 0:
            for s, p in zip(slow, net.parameters(), strict=True):
                s += alpha * (p.detach() - s)
                if reset:
                    p.data.copy_(s)
    return slow


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matches_the_formula_by_hand(name, reset):
    ours, theirs = model(torch.float64), model(torch.float64)
    sma = SMA(OPTIMIZERS[name](ours.parameters()), alpha=0.8, every=5, reset=reset)
    train(ours, sma, 23)
    slow = lookahead(theirs, OPTIMIZERS[name](theirs.parameters()), 23, 0.8, 5, reset)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(sma.slow_weights(), slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_alpha_one_is_the_plain_optimizer_exactly():
    ours, theirs = model(), model()
    train(ours, SMA(OPTIMIZERS["adam"](ours.parameters()), alpha=1.0), 17)
    train(theirs, OPTIMIZERS["adam"](theirs.parameters()), 17)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(dtype):
    def start():
        net = model(dtype)
        return net, SMA(OPTIMIZERS["adam"](net.parameters()))

    whole, optimizer = start()
    expected = train(whole, optimizer, 20)
    first, optimizer = start()
    train(first, optimizer, 13)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = start()
    train(second, optimizer, 4)  # some other history, to be overwritten
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(second, optimizer, 7, first=13) == expected[13:]
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))


def test_swap_shows_the_slow_weights_and_restores_bits():
    net = model(torch.bfloat16)
    sma = SMA(OPTIMIZERS["adam"](net.parameters()))
    train(net, sma, 7)
    before = [p.detach().clone() for p in net.parameters()]
    with sma.swap():
        for p, s in zip(net.parameters(), sma.slow_weights(), strict=True):
            assert torch.equal(p, s.to(p.dtype))
        for call in (sma.step, sma.sync, lambda: sma.swap().__enter__(), lambda: sma.load_state_dict({})):
            with pytest.raises(RuntimeError, match=r"leave swap\(\) first"):
                call()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert any(not torch.equal(a, s.to(a.dtype)) for a, s in zip(before, sma.slow_weights(), strict=True))
    with pytest.raises(KeyError), sma.swap():
        raise KeyError("inside")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_schedulers_groups_closures_and_hooks():
    net = model()
    inner = torch.optim.SGD([{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.2}])
    sma = SMA(inner, every=2)
    assert sma.param_groups is inner.param_groups and sma.state is inner.state
    called = []
    sma.register_step_post_hook(lambda *_: called.append(1))
    schedulers = [
        torch.optim.lr_scheduler.StepLR(sma, 1, 0.5),
        torch.optim.lr_scheduler.ReduceLROnPlateau(sma, factor=0.5, patience=0),
    ]
    loss = loss_of(net, 0)
    loss.backward()
    assert sma.step(lambda: loss) is loss
    schedulers[0].step()
    assert [group["lr"] for group in inner.param_groups] == [0.05, 0.1]
    for value in (1.0, 2.0):
        schedulers[1].step(value)
    assert [group["lr"] for group in inner.param_groups] == [0.025, 0.05]
    assert called == [1] and sma.steps == 1
    extra = torch.nn.Parameter(torch.ones(3))
    sma.add_param_group({"params": [extra], "lr": 1.0})
    assert len(inner.param_groups) == 3 and len(sma.slow_weights()) == 5
    extra.grad = torch.ones(3)
    sma.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), 1 - 0.8))  # slow 1, fast 0, averaged at step 2


def test_grad_scaler_skips_a_bad_step_without_counting_it():
    net = model()
    sma = SMA(torch.optim.SGD(net.parameters(), lr=0.1), every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in net.parameters()]
    scaler.scale(loss_of(net, 0)).backward()
    net[0].weight.grad[0, 0] = float("inf")
    scaler.step(sma)
    scaler.update()
    assert sma.steps == 0 and scaler.get_scale() == 2.0
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    sma.zero_grad()
    scaler.scale(loss_of(net, 0)).backward()
    scaler.step(sma)
    assert sma.steps == 1 and not torch.equal(before[0], net[0].weight)


def test_copies_keep_their_own_state():
    net = model()
    sma = SMA(OPTIMIZERS["adam"](net.parameters()))
    train(net, sma, 3)
    other_net, other = copy.deepcopy((net, sma))
    train(other_net, other, 4, first=3)
    assert (sma.steps, other.steps) == (3, 7)
    assert other.param_groups[0]["params"][0] is other_net[0].weight
    assert not torch.equal(other.slow_weights()[0], sma.slow_weights()[0])


def test_state_of_another_model_changes_nothing():
    net, wide = model(), torch.nn.Linear(9, 9)
    sma = SMA(torch.optim.SGD(net.parameters(), lr=0.1))
    foreign = SMA(torch.optim.SGD(wide.parameters(), lr=0.7), alpha=0.3)
    for state, message in (
        (foreign.state_dict(), "do not fit"),
        (sma.optimizer.state_dict(), "not a state of SMA"),
    ):
        with pytest.raises(ValueError, match=message):
            sma.load_state_dict(state)
    assert sma.alpha == 0.8 and sma.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "arguments", [{"alpha": 1.1}, {"alpha": -0.1}, {"alpha": float("nan")}, {"every": 0}, {"every": 1.5}]
)
def test_bad_arguments(arguments):
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SMA: "):
        SMA(optimizer, **arguments)
    with pytest.raises(TypeError, match="Optimizer, got list"):
        SMA([1])
    with pytest.raises(TypeError, match="already averaged"):
        SMA(SMA(optimizer))


def test_every_backend_gives_the_same_weights():
    results = []
    for backend, reason in lic_fast.explain("sma_update_", "cpu").reasons.items():
        if reason is None:
            net = model()
            with lic_fast.use_backend(backend):
                train(net, SMA(OPTIMIZERS["adam"](net.parameters())), 11)
            results.append([p.detach() for p in net.parameters()])
    assert results
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


def test_copies_and_pickles_under_a_scheduler_step_their_own_model():
    net = model()
    sma = SMA(torch.optim.SGD(net.parameters(), lr=0.1), every=2)
    torch.optim.lr_scheduler.StepLR(sma, 1)
    train(net, sma, 1)
    before = net[0].weight.detach().clone()
    for other_net, other in (copy.deepcopy((net, sma)), pickle.loads(pickle.dumps((net, sma)))):
        train(other_net, other, 1, first=1)
        assert other.steps == 2 and not torch.equal(other_net[0].weight, before)
        assert sma.steps == 1 and torch.equal(net[0].weight, before)


def test_a_first_swap_inside_inference_mode_spoils_nothing():
    net = model()
    sma = SMA(torch.optim.SGD(net.parameters(), lr=0.1), every=1)
    with torch.inference_mode(), sma.swap():
        net(torch.ones(1, 5))
    for backend in ("reference", "auto"):
        with lic_fast.use_backend(backend):
            train(net, sma, 1)
    assert not any(s.is_inference() for s in sma.slow_weights())


def test_frozen_weights_are_left_alone_and_restart_forgets():
    net = model()
    sma = SMA(torch.optim.SGD(net.parameters(), lr=0.1), every=1)
    train(net, sma, 1)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(7.0)
    net[0].weight.requires_grad_(False)
    sma.sync()
    assert torch.equal(net[0].weight, torch.full_like(net[0].weight, 7.0))
    assert not torch.equal(net[0].bias, torch.full_like(net[0].bias, 7.0))
    sma.restart()
    assert all(torch.equal(p, s) for p, s in zip(net.parameters(), sma.slow_weights(), strict=True))


def test_a_damaged_state_changes_nothing():
    net = model()
    sma = SMA(torch.optim.SGD(net.parameters(), lr=0.1))
    for damage in ({"every": 0}, {"alpha": float("nan")}, {"alpha": None}, {"steps": -1}):
        state = copy.deepcopy(sma.state_dict())
        state["optimizer"]["param_groups"][0]["lr"] = 99.0
        state["sma"] |= damage
        if damage == {"alpha": None}:
            del state["sma"]["alpha"]
        with pytest.raises(ValueError, match="SMA"):
            sma.load_state_dict(state)
        assert sma.param_groups[0]["lr"] == 0.1 and sma.every == 5


def test_complex_parameters_are_refused():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="floating dtype"):
        SMA(torch.optim.SGD([p], lr=0.1)).slow_weights()

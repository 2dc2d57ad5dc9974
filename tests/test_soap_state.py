"""What surrounds SOAP's steps: its state, resuming, settings, parameters of every kind."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from soap_training import SHAPES, give_gradients, parameters, tensors_of, train

from lic_fast.optim import SMA, SOAP


def test_state_has_no_factor_for_axes_of_size_one_and_is_no_larger_than_the_peers():
    p = torch.nn.Parameter(torch.randn(6, 8, 1, 1))
    optimizer = SOAP([p])
    train(optimizer, [p], 2)
    assert [len(q) for q in optimizer.state[p]["Q"]] == [6, 8, 0, 0]
    held = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors_of(optimizer.state_dict())}
    assert sum(held.values()) <= 4 * (2 * 48 + 2 * (36 + 64 + 2)) + 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("settings", [{}, {"stagger": True, "precondition_frequency": 4}], ids=str)
def test_resumes_bit_for_bit_through_a_file(dtype, settings):
    params = parameters(SHAPES, dtype)
    optimizer = SOAP(params, lr=1e-2, **settings)
    train(optimizer, params, 13)
    params[0].grad = torch.full_like(params[0], math.nan)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = SOAP(twins, **settings)
    other.load_state_dict(torch.load(file, weights_only=True))
    for run, ps in ((optimizer, params), (other, twins)):
        train(run, ps, 15, first=20)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert other.skipped_steps == optimizer.skipped_steps == 1
    assert all(
        s["exp_avg"].dtype is (torch.float64 if dtype is torch.float64 else torch.float32) for s in other.state.values()
    )


def test_copies_are_independent():
    params = parameters(SHAPES, torch.float32)
    optimizer = SOAP(params)
    train(optimizer, params, 5)
    twins, other = copy.deepcopy((params, optimizer))
    train(other, twins, 12, first=5)
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 12, first=5)
    assert all(torch.equal(p, q) and not torch.equal(p, b) for p, q, b in zip(params, twins, before, strict=True))


def nikhilvyas_state(params, steps):
    """A state_dict as nikhilvyas/SOAP writes it: int steps, 1x1 factors for axes of size 1, [] for none."""
    optimizer = SOAP(params)
    train(optimizer, params, steps)
    saved = copy.deepcopy(optimizer.state_dict())
    for key, p in enumerate(params):
        state = saved["state"][key]
        state["step"] = int(state["step"])
        del state["skipped"], state["phase"]
        for name in ("GG", "Q"):
            matrices = zip(state[name], p.shape, strict=True)
            state[name] = [torch.ones(1, 1) if d == 1 and p.dim() > 1 else m for m, d in matrices]
        state["precondition_frequency"], state["shampoo_beta"] = 10, 0.95
    for group in saved["param_groups"]:
        del group["precondition"]
    return saved


def test_loads_a_state_of_nikhilvyas_soap():
    params = parameters(SHAPES)
    saved = nikhilvyas_state(params, 14)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other, whole = SOAP(twins), SOAP(parameters(SHAPES))
    other.load_state_dict(saved)
    train(whole, whole.param_groups[0]["params"], 14)
    for run, ps in ((other, twins), (whole, whole.param_groups[0]["params"])):
        train(run, ps, 11, first=14)
    for p, q in zip(twins, whole.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["state"][0].pop("GG"), "parameter 0 of group 0 does not fit: GG is missing"),
        (lambda s: s["state"][2].update(exp_avg=torch.zeros(5, 12)), "exp_avg has shape"),
        (lambda s: s["state"][2].update(Q=[torch.eye(12)]), "Q has 1 factors, the settings here make 2"),
        (lambda s: s["state"][2].update(Q=[torch.eye(12), []]), "Q has no factor of size 5"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr must be a finite number >= 0"),
        (lambda s: s["param_groups"][0]["params"].pop(), "parameter groups do not fit"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil, message):
    params = parameters(SHAPES)
    optimizer = SOAP(params)
    train(optimizer, params, 3)
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    spoil(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(after), tensors_of(before), strict=True))


def test_a_gradient_that_is_not_finite_is_a_skipped_step():
    params = parameters([(6, 5), (4,), (3, 3, 3, 3)], torch.float32)
    optimizer = SOAP(params)
    give_gradients(params, seed=0)
    params[1].grad[0] = math.inf  # at its very first step
    optimizer.step()
    assert optimizer.skipped_steps == 1 and params[1] not in optimizer.state
    train(optimizer, params, 3, first=1)
    before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"][0])
    give_gradients(params, seed=9)
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    assert torch.equal(params[0], before[0][0]) and not torch.equal(params[2], before[0][2])
    after = optimizer.state_dict()["state"][0]
    assert torch.equal(after["GG"][0], before[1]["GG"][0]) and after["step"] == before[1]["step"]
    assert optimizer.skipped_steps == 2 and all(torch.isfinite(p).all() for p in params)
    train(optimizer, params, 12, first=10)
    assert all(torch.isfinite(p).all() for p in params)


def test_missing_late_and_added_parameters():
    a, b, c = parameters([(6, 5), (4, 3), (5,)])
    optimizer = SOAP([a, b])
    train(optimizer, [a], 3)
    assert b not in optimizer.state
    twin = torch.nn.Parameter(b.detach().clone())
    alone = SOAP([twin])
    optimizer.add_param_group({"params": c, "lr": 1e-2})
    for t in range(3, 20):
        give_gradients([a, b, c], seed=t)
        twin.grad = b.grad.clone()
        optimizer.step()
        alone.step()
    assert torch.equal(b, twin)  # its steps and refreshes count from its own first gradient
    b.grad = None  # frozen from here on
    before = b.detach().clone()
    for t in range(3):
        give_gradients([a, c], seed=t)
        optimizer.step()
    assert torch.equal(b, before) and optimizer.state[b]["step"] == 16 and optimizer.state[a]["step"] == 22


def test_settings_may_change_between_steps():
    a, b = parameters([(6, 5), (4,)]), parameters([(6, 5), (4,)])
    scheduled, whole = SOAP(a, lr=1e-2), SOAP(b, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(scheduled, 1, gamma=0.5)
    for t in range(6):
        give_gradients(a, b, seed=t)
        whole.param_groups[0]["lr"] = 1e-2 * 0.5**t
        scheduled.step()
        scheduler.step()
        whole.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    as_tensor = SOAP(parameters([(6, 5)]), lr=torch.tensor(1e-2), weight_decay=torch.tensor(0.01))
    as_number = SOAP(parameters([(6, 5)]), lr=1e-2, weight_decay=0.01)
    for run in (as_tensor, as_number):
        train(run, run.param_groups[0]["params"], 4)
    torch.testing.assert_close(
        as_tensor.param_groups[0]["params"][0], as_number.param_groups[0]["params"][0], rtol=1e-7, atol=0
    )


def test_plain_adam_groups_closures_scaler_and_sma():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    optimizer = SOAP(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "precondition": False}], lr=1e-2
    )

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(len(q) == 0 for q in optimizer.state[model[2].weight]["Q"])
    averaged = SMA(SOAP(model.parameters(), lr=1e-3), every=2)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(5):
        averaged.zero_grad()
        scaler.scale(torch.nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(averaged)
        scaler.update()
    averaged.load_state_dict(copy.deepcopy(averaged.state_dict()))
    assert math.isfinite(torch.nn.functional.mse_loss(model(x), y).item())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": "fast"}, "lr must be a finite number >= 0, got 'fast'"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"shampoo_beta": 1.0}, "shampoo_beta must be below 1"),
        ({"eps": float("nan")}, "eps must be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"precondition_frequency": 0}, "precondition_frequency must be a whole number >= 1, got 0"),
        ({"max_precond_dim": 2.5}, "max_precond_dim must be a whole number"),
        ({"data_format": "NHWC"}, "data_format must be one of channels_first, channels_last"),
        ({"refresh": "svd"}, "refresh must be one of auto, cholesky_qr, qr, eigh"),
        ({"precision": "bf16"}, "precision must be one of"),
        ({"refresh_memory": 0}, "refresh_memory must be None or"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=f"^SOAP: {message}") as caught:
        SOAP(parameters([(3, 2)]), **settings)
    assert "\n" not in str(caught.value)
    if not set(settings) & {"data_format", "refresh", "precision", "refresh_memory"}:
        optimizer = SOAP(parameters([(3, 2)]))
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": parameters([(2,)]), **settings})
        assert len(optimizer.param_groups) == 1


def test_gradients_and_parameters_that_are_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = SOAP(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradients must be dense, got torch\.sparse_coo"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"must be fp32, bf16, fp16 or fp64, got torch\.complex64"):
        SOAP([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="more than 5 axes longer than 1"):
        SOAP([torch.nn.Parameter(torch.ones(2, 2, 2, 2, 2, 2))])
    SOAP([{"params": [torch.nn.Parameter(torch.ones(2, 2, 2, 2, 2, 2))], "precondition": False}])


def test_odd_parameters_train():
    params = [torch.nn.Parameter(torch.randn(s)) for s in [(), (1, 1), (0, 3), (1, 1, 5), (3, 1, 1, 2)]]
    optimizer = SOAP(params)
    train(optimizer, params, 12)
    assert all(p.isfinite().all() for p in params)
    frozen = torch.nn.Parameter(torch.randn(3, 4)[:, ::2])
    strided = SOAP([frozen], merge_dims=True)
    before = frozen.detach().clone()
    train(strided, [frozen], 3)
    assert not torch.equal(frozen, before)


def test_autograd_sees_that_parameters_change():
    w = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = SOAP([w])
    give_gradients([w], seed=0)
    optimizer.step()
    loss = (w * w).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

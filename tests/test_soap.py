"""lic_fast.optim.SOAP's steps, against pytorch_optimizer's port of nikhilvyas/SOAP and against itself."""

from __future__ import annotations

import math

import pytest
import torch
from shapes import elic
from soap_training import SHAPES, give_gradients, parameters, train

import lic_fast
from lic_fast.optim import SOAP


@pytest.fixture
def peer(monkeypatch):
    """pytorch_optimizer's SOAP, whose QR is fp32 whatever the parameters, in fp64 throughout."""
    module = pytest.importorskip("pytorch_optimizer.optimizer.soap")

    class Wide:
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(module, "torch", Wide())

    def make(groups, **kwargs):
        names = {"max_precond_dim": "max_precondition_dim", "normalize_grads": "normalize_gradient"}
        return module.SOAP(groups, **{names.get(k, k): v for k, v in kwargs.items()})

    return make


def two_groups(params):
    half = len(params) // 2
    other = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.97)}
    return [{"params": params[:half]}, {"params": params[half:], **other}]


def worst_update_error(ours, theirs, settings, shapes, steps, dtype=torch.float64, grouped=False):
    a, b = parameters(shapes, dtype), parameters(shapes, dtype)
    group = two_groups if grouped else list
    mine, peer = ours(group(a), **settings), theirs(group(b), **settings)
    worst = 0.0
    for t in range(steps):
        before = [p.detach().clone() for p in a], [p.detach().clone() for p in b]
        give_gradients(a, b, seed=t)
        mine.step()
        peer.step()
        for p, q, x, y in zip(a, b, *before, strict=True):
            moved, expected = p.detach() - x, q.detach() - y
            if expected.norm() > 0:
                worst = max(worst, ((moved - expected).norm() / expected.norm()).item())
            else:
                assert not moved.any()
    return worst


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_precond_dim": 7},
        {"precondition_1d": True},
        {"weight_decay": 0.0, "correct_bias": False},
        {"normalize_grads": True},
        {"precondition_frequency": 3, "lr": 1e-2, "betas": (0.9, 0.99)},
        {"shampoo_beta": 0.8},
    ],
    ids=str,
)
def test_follows_pytorch_optimizer_in_fp64(peer, settings, grouped):
    """50 steps, 5 refreshes and more: the same updates to 1e-8, where every factor has full rank."""
    if "normalize_grads" in settings:  # pytorch_optimizer adds eps, nikhilvyas/SOAP 1e-30: the same at eps = 1e-30
        settings = settings | {"eps": 1e-30}
    assert worst_update_error(SOAP, peer, settings, SHAPES, 50, grouped=grouped) <= 1e-8


@pytest.mark.parametrize("refresh", ["cholesky_qr", "qr"])
def test_every_refresh_method_is_the_same_step(peer, refresh):
    def ours(params, **settings):
        return SOAP(params, refresh=refresh, **settings)

    assert worst_update_error(ours, peer, {}, SHAPES, 35) <= 1e-8


def test_follows_pytorch_optimizer_on_a_narrow_elic(peer):
    shapes = sorted({tuple(s) for s in elic((16, 24))})
    full_rank = [
        s for s in shapes if len(s) == 1 or all(d * d <= math.prod(s) for d in s)
    ]  # else rounding chooses the null space
    assert {len(s) for s in full_rank} >= {1, 4} and len(full_rank) >= 10
    assert worst_update_error(SOAP, peer, {"precondition_frequency": 4}, full_rank, 13) <= 1e-8


def test_merging_of_axes_follows_nikhilvyas():
    """pytorch_optimizer's merging is broken (everything merged becomes [1]): checked against axes merged by hand."""

    def by_hand(shape):
        return {(8, 6, 3, 3): (8, 18, 3), (12, 5): (12, 5), (4, 5, 2): (20, 2), (4, 3, 3): (36,), (64, 2, 2): (64, 4)}[
            shape
        ]

    shapes = [(8, 6, 3, 3), (12, 5), (4, 5, 2), (64, 2, 2)]
    from lic_fast.optim._soap_plan import merged

    assert [merged(s, 30) for s in shapes] == [by_hand(s) for s in shapes] and merged((4, 3, 3), 36) == (36,)
    assert merged((192, 3, 5, 5), 10000) == (2880, 5) and merged((96, 96, 1, 1), 10000) == (9216,)
    a = parameters(shapes)
    b = [torch.nn.Parameter(p.detach().reshape(by_hand(s)).clone()) for p, s in zip(a, shapes, strict=True)]
    mine, plain = SOAP(a, merge_dims=True, max_precond_dim=30), SOAP(b, max_precond_dim=30)
    for t in range(25):
        give_gradients(a, seed=t)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.reshape(q.shape).clone()
        mine.step()
        plain.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.reshape(q.shape), q, rtol=1e-9, atol=1e-12)


def test_merging_with_channels_last_data():
    a, nchw = torch.randn(6, 3, 3, 4, dtype=torch.float64), []
    p = torch.nn.Parameter(a.clone())
    q = torch.nn.Parameter(a.permute(0, 3, 1, 2).contiguous())
    mine = SOAP([p], merge_dims=True, max_precond_dim=24, data_format="channels_last")
    peer = SOAP([q], merge_dims=True, max_precond_dim=24)
    for t in range(25):
        give_gradients([p], seed=t)
        q.grad = p.grad.permute(0, 3, 1, 2).contiguous()
        mine.step()
        peer.step()
        nchw.append((p.permute(0, 3, 1, 2) - q).abs().max().item())
    assert max(nchw) <= 1e-10
    assert mine.state[p]["exp_avg"].shape == p.shape


def test_first_step_only_initialises():
    params = parameters(SHAPES, torch.float32)
    before = [p.detach().clone() for p in params]
    optimizer = SOAP(params)
    train(optimizer, params, 1)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    for p in params:
        state = optimizer.state[p]
        assert state["step"] == 0 and not state["exp_avg"].any() and len(state["Q"]) == p.dim()
    train(optimizer, params, 1, first=1)
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_backends_train_alike(backend):
    if lic_fast.explain("soap_update_").reasons[backend]:
        pytest.skip(str(lic_fast.explain("soap_update_").reasons[backend]))
    shapes = [(8, 6, 3, 3), (7,), (4, 3, 2, 3, 3), (6, 6), (2, 3, 4)]  # of full rank
    a, b = parameters(shapes, torch.float32), parameters(shapes, torch.float64)
    low, exact = SOAP(a), SOAP(b)
    for t in range(12):
        give_gradients(b, seed=t)
        for p, q in zip(a, b, strict=True):
            p.grad = q.grad.float()
        with lic_fast.use_backend(backend):
            low.step()
        with lic_fast.use_backend("reference"):
            exact.step()
    for p, q in zip(a, b, strict=True):
        assert (p - q).abs().max() <= 2e-4 * q.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters_follow_fp32_ones(dtype):
    a = parameters([(8, 6, 3, 3), (12, 5), (7,)], dtype)
    b = [torch.nn.Parameter(p.detach().float()) for p in a]
    low, high = SOAP(a, lr=1e-2), SOAP(b, lr=1e-2)
    for t in range(12):
        give_gradients(a, seed=t)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.float()
        low.step()
        high.step()
    for p, q in zip(a, b, strict=True):
        assert (p.float() - q).abs().max() <= 12 * torch.finfo(dtype).eps * q.abs().max()
        assert low.state[p]["exp_avg"].dtype is torch.float32


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_channels_last_weights(layout):
    a = torch.nn.Conv2d(6, 8, 3).to(memory_format=layout)
    p, q = a.weight, torch.nn.Parameter(a.weight.detach().clone().contiguous())
    first, second = SOAP([p]), SOAP([q])
    for t in range(12):
        give_gradients([q], seed=t)
        p.grad = q.grad.to(memory_format=layout)
        first.step()
        second.step()
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert p.is_contiguous(memory_format=layout)


def test_stagger_refreshes_everything_once_a_period_and_evenly():
    params = parameters([(24, 24)] * 8 + [(8, 8)] * 3, torch.float32)
    optimizer = SOAP(params, stagger=True, precondition_frequency=4)
    train(optimizer, params, 1)
    done = []
    for t in range(1, 9):
        before = optimizer.refreshed_matrices, optimizer.refreshed_flops
        train(optimizer, params, 1, first=t)
        done.append((optimizer.refreshed_matrices - before[0], optimizer.refreshed_flops - before[1]))
    assert sum(n for n, _ in done[:4]) == sum(n for n, _ in done[4:]) == 22
    work = [flops for _, flops in done]
    assert max(work) <= 1.3 * sum(work) / len(work)
    together = SOAP(parameters([(24, 24)] * 8), precondition_frequency=4)
    train(together, together.param_groups[0]["params"], 5)
    assert together.refreshed_matrices == 16


def test_a_bound_on_the_memory_of_a_refresh_changes_nothing_else(monkeypatch):
    import lic_fast.optim._soap_refresh as room

    whole, bounded = parameters(SHAPES), parameters(SHAPES)
    sizes = []
    real = room.refresh_eigenbasis
    monkeypatch.setattr(
        room, "refresh_eigenbasis", lambda GG, Q, **k: (sizes.append(sum(x.nbytes for x in GG)), real(GG, Q, **k))[1]
    )
    for params, optimizer in ((whole, SOAP(whole)), (bounded, SOAP(bounded, refresh_memory=20_000))):
        train(optimizer, params, 11)
        if params is whole:
            most = sizes.pop()
            assert not sizes
    assert len(sizes) > 2 and max(sizes) < most
    assert all(torch.allclose(p, q, rtol=1e-12, atol=1e-14) for p, q in zip(whole, bounded, strict=True))

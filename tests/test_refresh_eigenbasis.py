"""lic_fast.functional.refresh_eigenbasis in every backend at hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import backend_parameters

import lic_fast
from lic_fast.functional import refresh_eigenbasis
from lic_fast.reference.refresh_eigenbasis import cholesky_qr, without_zero_columns

EVERY_BACKEND = backend_parameters("refresh_eigenbasis")
SIZES = [1, 2, 3, 5, 16, 31, 33, 64, 96, 130]


def decaying(d, g, decades=3.0, rank=None, dtype=torch.float32):
    """A factor as training makes them: an average of products of gradients whose spectrum decays."""
    rank = rank or d
    directions = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q[:, :rank]
    scales = torch.logspace(0, -decades, rank, dtype=torch.float64)
    x = directions @ (scales[:, None] * torch.randn(rank, 4 * d, generator=g, dtype=torch.float64))
    return (x @ x.T / (4 * d)).to(dtype)


def earlier_basis(GG, g, amount=0.03):
    """The eigenvectors of a factor a few steps ago."""
    noise = torch.randn(GG.shape, generator=g, dtype=torch.float64)
    scale = GG.double().diagonal(dim1=-2, dim2=-1).sqrt()
    moved = GG.double() + amount * scale[..., :, None] * (noise + noise.mT) * scale[..., None, :]
    return torch.linalg.eigh(moved).eigenvectors.flip(-1).contiguous().to(GG.dtype)


def batch(d, n=3, seed=0, dtype=torch.float32, **kwargs):
    g = torch.Generator().manual_seed(seed + d)
    GG = torch.stack([decaying(d, g, dtype=dtype, **kwargs) for _ in range(n)])
    return GG, earlier_basis(GG, g)


def off_diagonal(GG, Q):
    rotated = Q.double().mT @ GG.double() @ Q.double()
    return torch.linalg.matrix_norm(rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1)))


def orthogonality(Q):
    eye = torch.eye(Q.shape[-1], dtype=torch.float64)
    return (Q.double().cpu().mT @ Q.double().cpu() - eye).abs().amax((-2, -1))


def columns_of_qr(GG, Q, order):
    """fp64 Householder QR of the same product, in the order that was reported."""
    P = (GG.double() @ Q.double()).gather(-1, order[:, None, :].expand(Q.shape))
    return torch.linalg.qr(P).Q


def column_error(new, exact):
    sign = torch.where((new.double() * exact).sum(-2, keepdim=True) < 0, -1.0, 1.0)
    return torch.linalg.vector_norm(new.double() * sign - exact, dim=-2).amax().item()


@EVERY_BACKEND
@pytest.mark.parametrize("method", ["cholesky_qr", "qr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_q_of_a_qr_factorisation(device, backend, method, dtype):
    pairs = [batch(d, dtype=dtype, decades=1.5) for d in SIZES]
    GG, Q = [gg.to(device) for gg, _ in pairs], [q.to(device) for _, q in pairs]
    with lic_fast.use_backend(backend):
        new, order, rotation, served = refresh_eigenbasis(GG, Q, method=method)
    tight = 1e-9 if dtype is torch.float64 else 1e-5
    for (gg, q), basis, o, r, good in zip(pairs, new, order, rotation, served, strict=True):
        basis, o, r = basis.cpu(), o.cpu(), r.cpu()
        assert good.all() and basis.shape == q.shape and basis.dtype is dtype
        assert orthogonality(basis).max() <= tight
        rayleigh = (q.double() * (gg.double() @ q.double())).sum(-2).gather(-1, o)
        assert (rayleigh.diff(dim=-1) <= 1e-5 * rayleigh[:, :1]).all()
        assert all(sorted(row) == list(range(q.shape[-1])) for row in o.tolist())
        assert column_error(basis, columns_of_qr(gg, q, o)) <= 40 * tight  # P itself is rounded to dtype
        torch.testing.assert_close(r.double(), q.double().mT @ basis.double(), rtol=0, atol=tight)


@EVERY_BACKEND
def test_each_refresh_comes_nearer_to_the_eigenvectors(device, backend):
    GG, Q = batch(96, n=4)
    energy = [off_diagonal(GG, Q)]
    basis = Q
    with lic_fast.use_backend(backend):
        for _ in range(4):
            basis = refresh_eigenbasis([GG.to(device)], [basis.to(device)])[0][0].cpu()
            energy.append(off_diagonal(GG, basis))
    for before, after in itertools.pairwise(energy):
        assert (after <= before).all()
    assert (energy[-1] <= 0.3 * energy[0]).all()


@EVERY_BACKEND
@pytest.mark.parametrize("rank", [1, 4, 60])
def test_factors_without_full_rank_end_orthogonal_and_no_worse_than_householder(device, backend, rank):
    GG, Q = batch(128, rank=rank)
    with lic_fast.use_backend(backend):
        new = refresh_eigenbasis([GG.to(device)], [Q.to(device)])[0][0].cpu()
    assert orthogonality(new).max() <= 1e-5
    P = (GG @ Q).gather(-1, (Q * (GG @ Q)).sum(-2).argsort(dim=-1, descending=True)[:, None].expand(Q.shape))
    peer = torch.linalg.qr(P).Q  # what nikhilvyas/SOAP does, fp32
    scale = torch.linalg.matrix_norm(GG.double())
    assert (off_diagonal(GG, new) <= 1.05 * off_diagonal(GG, peer) + 1e-6 * scale).all()


def dead_channels(GG, which):
    alive = torch.ones(GG.shape[-1])
    alive[which] = 0
    return GG * alive[:, None] * alive


@EVERY_BACKEND
def test_dead_channels_leave_an_orthogonal_basis(device, backend):
    GG, Q = batch(40)
    GG = dead_channels(GG, [3, 17])
    Q = torch.linalg.eigh(GG.double()).eigenvectors.flip(-1).float().contiguous()
    with lic_fast.use_backend(backend):
        new = refresh_eigenbasis([GG.to(device)], [Q.to(device)])[0][0].cpu()
    assert orthogonality(new).max() <= 1e-5
    assert (off_diagonal(GG, new) <= off_diagonal(GG, Q) + 1e-6).all()


def test_the_way_without_a_wait_serves_dead_channels():
    """What CUDA does, where no failure can be asked for: a column of zeros keeps the old vector."""
    GG, _ = batch(40, dtype=torch.float64)
    GG = dead_channels(GG, [3, 17])
    Q = torch.linalg.eigh(GG).eigenvectors.flip(-1)
    Q[..., -2:] = 0
    Q[:, 3, -2] = Q[:, 17, -1] = 1
    P = GG @ Q
    assert not P[..., -2:].any() and not cholesky_qr(P, torch.float32)[1].any()
    new, served = cholesky_qr(without_zero_columns(P, Q), torch.float32)
    assert served.all() and orthogonality(new).max() <= 1e-5
    torch.testing.assert_close(new[..., -2:], Q[..., -2:].float())


def stress():
    """(name, GG [d, d], Q [d, d]) with everything a batch may hold."""
    g = torch.Generator().manual_seed(7)
    d = 48
    good = decaying(d, g)
    Q = earlier_basis(good[None], g)[0]
    scales = torch.logspace(-10, 10, d)
    cases = {
        "good": good,
        "rank deficient": decaying(d, g, rank=3),
        "clustered": torch.eye(d) + 1e-7 * good,
        "badly scaled": scales[:, None] * good * scales,
        "large": good * 1e30,
        "small": good * 1e-30,
        "zero": torch.zeros(d, d),
        "nan": torch.where(torch.eye(d) > 0, float("nan"), good),
        "inf": torch.full((d, d), float("inf")),
        "nearly collinear": torch.ones(d, d) + 1e-6 * good,
    }
    return list(cases), torch.stack(list(cases.values())), Q.expand(len(cases), d, d).contiguous()


@EVERY_BACKEND
@pytest.mark.parametrize("method", ["cholesky_qr", "qr", "eigh"])
def test_stress_batch_ends_finite_and_orthogonal(device, backend, method):
    names, GG, Q = stress()
    with lic_fast.use_backend(backend):
        new, order, rotation, served = (
            x[0].cpu() for x in refresh_eigenbasis([GG.to(device)], [Q.to(device)], method=method)
        )
        alone = refresh_eigenbasis([GG[:1].to(device)], [Q[:1].to(device)], method=method)[0][0].cpu()
    assert new.isfinite().all() and rotation.isfinite().all()
    for name, error in zip(names, orthogonality(new).tolist(), strict=True):
        assert error <= 1e-5, name
    assert served[names.index("good")] and not served[names.index("nan")] and not served[names.index("inf")]
    for name in ("nan", "inf"):
        assert torch.equal(new[names.index(name)], Q[0]) and order[names.index(name)].tolist() == list(range(48))
    torch.testing.assert_close(new[:1], alone)  # neighbours do not matter


@EVERY_BACKEND
def test_a_matrix_of_size_one_and_empty_batches(device, backend):
    GG, Q = torch.tensor([[[3.0]], [[0.0]]], device=device), torch.ones(2, 1, 1, device=device)
    with lic_fast.use_backend(backend):
        new, order, rotation, _ = refresh_eigenbasis([GG, GG[:0]], [Q, Q[:0]])
        assert refresh_eigenbasis([], []) == ([], [], [], [])
    assert new[0].flatten().tolist() == [1, 1] == rotation[0].flatten().tolist() and order[0].tolist() == [[0], [0]]
    assert [x.shape for x in (new[1], order[1], rotation[1])] == [(0, 1, 1), (0, 1), (0, 1, 1)]


def test_threads_do_not_change_the_result():
    pairs = [batch(d, n=5) for d in (20, 70, 130)]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(refresh_eigenbasis([gg for gg, _ in pairs], [q for _, q in pairs])[0])
    torch.set_num_threads(before)
    if lic_fast.explain("refresh_eigenbasis").chosen == "cpp":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EVERY_BACKEND
def test_opcheck(device, backend):
    GG, Q = batch(7)
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.refresh_eigenbasis, ([GG.to(device)], [Q.to(device)], "cholesky_qr"))


@pytest.mark.parametrize(
    ("GG", "Q", "method", "error", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), "qr", ValueError, r"GG\[0\] must be a batch of square matrices"),
        (torch.ones(3, 3), torch.ones(3, 3), "qr", ValueError, r"batch of square matrices \[N, d, d\], got \[3, 3\]"),
        (torch.ones(1, 3, 3), torch.ones(2, 3, 3), "qr", ValueError, r"Q\[0\] must have the shape of GG\[0\]"),
        (torch.ones(1, 3, 3), torch.ones(1, 3, 3), "lu", ValueError, "unknown method, got 'lu'"),
        (torch.ones(1, 3, 3).half(), torch.ones(1, 3, 3).half(), "qr", TypeError, r"GG\[0\] must be one of float32"),
        (torch.ones(1, 3, 3), [], "qr", ValueError, "lists differ in length"),
    ],
)
def test_bad_input_is_named(GG, Q, method, error, message):
    with pytest.raises(error, match=message) as caught:
        refresh_eigenbasis(GG, Q, method=method)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("refresh_eigenbasis: ")

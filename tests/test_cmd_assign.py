"""lic_fast.functional.cmd_assign in every backend at hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_parameters

import lic_fast
from lic_fast.functional import cmd_assign
from lic_fast.ops._library import FLOATS

EVERY_BACKEND = backend_parameters("cmd_assign")
INTERPRETED = ("cpu", "triton")


def walks(epochs, n, modes, dtype=torch.float32, device="cpu", seed=0):
    """Random walks and references of which every weight follows one, some upside down, with noise of its own."""
    g = torch.Generator().manual_seed(seed)
    refs = torch.randn(modes, epochs, generator=g, dtype=torch.float64).cumsum(1)
    pick = torch.randint(0, modes, (n,), generator=g)
    k = torch.randn(n, generator=g, dtype=torch.float64)
    noise = torch.randn(epochs, n, generator=g, dtype=torch.float64).cumsum(0)
    x = k * refs[pick].T + torch.randn(n, generator=g, dtype=torch.float64) + 0.2 * noise
    return x.contiguous().to(dtype).to(device), refs.to(device)


def run(backend, snapshots, refs):
    with lic_fast.use_backend(backend):
        return cmd_assign(snapshots, refs)


def transcribed(snapshots, refs):
    """The specification step by step in NumPy, whose square root is rounded right."""
    x, refs = snapshots.double().cpu().numpy(), refs.cpu()
    moved = refs - refs[:, :1]
    middle = moved.mean(1, keepdim=True)
    centred = moved - middle
    norm = (centred * centred).sum(1, keepdim=True).sqrt()
    moves = (norm > 0).numpy()
    directions = np.where(moves, (centred / norm).numpy(), 0.0)
    mean, norm = (np.where(moves, t.numpy(), 0.0)[:, 0] for t in (refs[:, :1] + middle, norm))
    with np.errstate(all="ignore"):
        num, total, squares = np.zeros((len(norm), x.shape[1])), np.zeros(x.shape[1]), np.zeros(x.shape[1])
        for t in range(1, len(x)):
            y = x[t] - x[0]
            num += y * directions[:, t : t + 1]
            total += y
            squares += y * y
        spread = np.maximum(squares - total * total / len(x), 0)
        finite = np.isfinite(squares)
        num[:, ~(finite & (spread > 0))] = 0
        mode = np.abs(num).argmax(0)
        num = num[mode, np.arange(x.shape[1])]
        k = np.where(norm[mode] > 0, num / norm[mode], 0)
        d = np.where(finite, (x[0] + total / len(x)) - k * mean[mode], x[-1])
        correlation = np.where(num != 0, np.minimum(np.abs(num) / np.sqrt(spread), 1), 0)
    dtype = torch.float64 if snapshots.dtype is torch.float64 else torch.float32
    return torch.from_numpy(mode).byte(), *(torch.from_numpy(v).to(dtype) for v in (k, d, correlation))


def assert_same(ours, theirs, backend):
    """To the bit; the reference's square root is torch's, which on the CPU is off by one unit now and then."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        if i == 3 and backend == "reference":
            assert (a.cpu() - b).abs().max() <= 2.3e-16 if b.numel() else True
        else:
            assert torch.equal(a.cpu().nan_to_num(-7.0), b.nan_to_num(-7.0)), f"output {i}"


@EVERY_BACKEND
def test_against_corrcoef_and_least_squares(device, backend):
    snapshots, refs = walks(20, 400, 10, torch.float64, device)
    mode, k, d, correlation = run(backend, snapshots, refs)
    x, r = snapshots.cpu().numpy(), refs.cpu().numpy()
    table = np.abs(np.corrcoef(np.concatenate([x.T, r]))[: x.shape[1], x.shape[1] :])
    assert np.array_equal(mode.cpu().numpy(), table.argmax(1))
    assert np.allclose(correlation.cpu().numpy(), table.max(1), rtol=1e-12)
    for i in range(x.shape[1]):
        design = np.stack([r[mode[i]], np.ones(20)], 1)
        (slope, shift), *_ = np.linalg.lstsq(design, x[:, i], rcond=None)
        assert np.allclose([k[i].item(), d[i].item()], [slope, shift], rtol=1e-9, atol=1e-11)
    assert len(mode.unique()) == 10 and (k < 0).any() and (k > 0).any()  # modes and signs all occur


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("epochs", "n", "modes"),
    [(2, 17, 1), (20, 1025, 10), (7, 531, 20), (5, 333, 63), (3, 130, 256), (4, 1, 3), (4, 0, 3), (70, 40, 12)],
)
def test_the_bits_of_the_specification(device, backend, dtype, epochs, n, modes):
    snapshots, refs = walks(epochs, n, modes, dtype, device)
    assert_same(run(backend, snapshots, refs), transcribed(snapshots, refs), backend)


@EVERY_BACKEND
def test_many_epochs(device, backend):
    snapshots, refs = walks(300 if (device, backend) == INTERPRETED else 4096, 35, 5, torch.float32, device)
    assert_same(run(backend, snapshots, refs), transcribed(snapshots, refs), backend)


@EVERY_BACKEND
def test_every_half_is_read_right(device, backend):
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).short().view(torch.float16)
    snapshots = torch.stack([torch.zeros_like(halves), halves]).to(device)
    _, k, d, _ = run(backend, snapshots, torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=device))
    finite = halves.isfinite()
    assert torch.allclose(k.cpu()[finite], halves[finite].float(), rtol=1e-6, atol=0)
    assert torch.equal(d.cpu()[~finite].nan_to_num(7.0), halves[~finite].float().nan_to_num(7.0))


@EVERY_BACKEND
def test_what_does_not_move_or_is_not_finite(device, backend):
    inf, nan = float("inf"), float("nan")
    columns = [
        [2.5, 2.5, 2.5, 2.5], [1.0, nan, 2.0, 3.0], [nan, 1.0, 2.0, 3.0], [inf, inf, inf, inf], [1.0, 2.0, 3.0, -inf],
        [1.0, 2.0, 4.0, 7.0], [0.0, 0.0, 0.0, 0.0], [-3e38, 3e38, -3e38, 3e38],
    ]  # fmt: skip
    snapshots = torch.tensor(columns, device=device).T.contiguous()
    refs = torch.tensor([[5.0] * 4, [0.0, 1.0, 3.0, 6.0], [0.1] * 4, [nan, 1.0, 2.0, 3.0]], device=device).double()
    mode, k, d, correlation = (t.cpu() for t in run(backend, snapshots, refs))
    assert mode.tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    assert k[:7].tolist() == [0, 0, 0, 0, 0, 1, 0] and d[:7].tolist() == [2.5, 3.0, 3.0, inf, -inf, 1.0, 0.0]
    assert correlation[:7].tolist() == [0, 0, 0, 0, 0, 1, 0] and 0 < correlation[7] < 1 and d[7].isfinite()
    for still in (torch.full((2, 4), 0.1, device=device).double(), refs[:1]):
        mode, k, d, correlation = (t.cpu() for t in run(backend, snapshots, still))
        assert not mode.any() and not k.any() and not correlation.any()
        assert torch.equal(d[[0, 5, 6]], torch.tensor([2.5, 3.5, 0.0]))


@EVERY_BACKEND
def test_squares_beyond_fp64_keep_the_last_value(device, backend):
    snapshots = torch.tensor([[1.0, 1e300], [-1e200, -1e300], [5.0, 1e300]], dtype=torch.float64, device=device)
    refs = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64, device=device)
    mode, k, d, correlation = (t.cpu() for t in run(backend, snapshots, refs))
    assert not mode.any() and not k.any() and not correlation.any() and d.tolist() == [5.0, 1e300]


@EVERY_BACKEND
def test_a_small_movement_on_a_large_offset(device, backend):
    _, refs = walks(20, 1, 6, device=device)
    exact = 1e3 + 1e-3 * refs.repeat_interleave(50, 0).T
    snapshots = exact.float().contiguous()  # off by up to 3e-5, a fraction of the movement
    mode, k, d, correlation = run(backend, snapshots, refs)
    assert torch.equal(mode.cpu(), torch.arange(6).repeat_interleave(50).byte())
    assert (correlation > 0.99).all()
    fitted = k.double() * refs[mode.long()].T + d.double()
    assert (fitted - snapshots.double()).abs().max() < 2e-4


@EVERY_BACKEND
def test_signs_and_ties(device, backend):
    ref = torch.tensor([0.0, 1.0, -1.0, 3.0], dtype=torch.float64, device=device)
    refs = torch.stack([torch.tensor([1.0, 0, 0, 0], dtype=torch.float64, device=device), ref, -ref, 2 * ref, ref])
    many = torch.cat([refs, refs, refs, refs])  # ties between groups of modes
    snapshots = torch.stack([ref, -ref, 3 * ref + 7], 1).float()
    for table in (refs, many):
        mode, k, d, correlation = (t.cpu() for t in run(backend, snapshots, table))
        assert mode.tolist() == [1, 1, 1]
        assert torch.allclose(k, torch.tensor([1.0, -1.0, 3.0])) and torch.allclose(correlation, torch.ones(3))
        assert torch.allclose(d, torch.tensor([0.0, 0.0, 7.0]), atol=1e-6) and (correlation <= 1).all()


@EVERY_BACKEND
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_with_gaps_and_misaligned_rows(device, backend, dtype, first):
    snapshots, refs = walks(6, 301, 4, dtype, device)
    wide = torch.full((6, 400), float("nan"), dtype=dtype, device=device)
    wide[:, first : first + 301] = snapshots
    refs_wide = torch.stack([refs, torch.full_like(refs, float("nan"))], 2)
    ours = run(backend, wide[:, first : first + 301], refs_wide[..., 0])
    assert_same(ours, transcribed(snapshots, refs), backend)


@pytest.mark.parametrize("backend", [b for d, b in EVERY_BACKEND.args[1] if d == "cpu" and b != "triton"])
def test_any_number_of_threads(backend):
    snapshots, refs = walks(8, 70_001, 13, torch.bfloat16)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(backend, snapshots, refs))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EVERY_BACKEND
def test_opcheck_and_compile(device, backend):
    snapshots, refs = walks(5, 33, 3, device=device)
    expected = run(backend, snapshots, refs)
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.cmd_assign, (snapshots, refs))
        torch.library.opcheck(torch.ops.lic_fast.cmd_assign, (snapshots.T.contiguous().T, refs))
        compiled = torch.compile(cmd_assign, fullgraph=True, backend="aot_eager")(snapshots, refs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))


X, R = torch.zeros(4, 6), torch.zeros(2, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("snapshots", "refs", "error", "message"),
    [
        (X[0], R, ValueError, r"snapshots must have two dimensions \[T, n\], got shape \[6\]"),
        (X, R[0], ValueError, r"refs must have two dimensions \[M, T\], got shape \[4\]"),
        (X[:1], R[:, :1], ValueError, "snapshots must have 2 to 4096 rows, got 1"),
        (torch.zeros(4097, 1), R, ValueError, "got 4097"),
        (X.T, R, ValueError, "must be adjacent, got a stride of 6"),
        (X, R[:, :3], ValueError, r"refs must be \[M, 4\] with 1 <= M <= 256, got \[2, 3\]"),
        (X, R[:0], ValueError, r"got \[0, 4\]"),
        (X, R[:1].expand(257, 4), ValueError, r"got \[257, 4\]"),
        (X.long(), R, TypeError, "snapshots must be one of float32, bfloat16, float16, float64, got torch.int64"),
        (X, R.float(), TypeError, "refs must be one of float64, got torch.float32"),
        (X, R.to("meta"), TypeError, "refs must be on the device of snapshots"),
        (3.0, R, TypeError, "snapshots must be a tensor, got float"),
        (X.clone().requires_grad_(), R, RuntimeError, "snapshots requires grad"),
    ],
)
def test_bad_input_is_named(snapshots, refs, error, message):
    with pytest.raises(error, match=message) as caught:
        cmd_assign(snapshots, refs)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("cmd_assign: ")


@pytest.mark.skipif("cpp" not in lic_fast.explain("cmd_assign", "cpu").reasons, reason="not built")
@pytest.mark.parametrize("shape", [(0, 5), (2, 4), (257, 5)])
def test_the_op_reads_nothing_beyond_refs(shape):
    with lic_fast.use_backend("cpp"), pytest.raises(RuntimeError, match=r"refs must be \[M, T\]"):
        torch.ops.lic_fast.cmd_assign(torch.ones(5, 100), torch.ones(shape, dtype=torch.float64))

"""Ops that find what follows what in a training (CMD, STDET): sensitivity, modes, selection, online least squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._library import FLOATS
from ..ops.embed_select import DTYPES as SELECTED
from ..ops.sensitivity_accumulate import KINDS
from ..ops.sensitivity_accumulate import SPEC as SENSITIVITY
from ..ops.sensitivity_accumulate import attempt as attempt_sensitivity_
from ..ops.stdet import layout as _layout
from . import _check
from .embedding import _check_layout, _flat_of
from .parameters import _by_dtype

MOST_EPOCHS, MOST_MODES = 4096, 256  # of cmd_assign


def cmd_assign(snapshots: Tensor, refs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mode of every weight by correlation mode decomposition, and its affine fit: (mode, k, d, correlation).

    snapshots [T, n] bf16, fp16, fp32 or fp64: row t holds all weights at epoch t, or how far they are from where they
    were at some epoch; 2 <= T <= 4096, elements of a row adjacent, rows any distance apart. refs [M, T] fp64: the
    trajectories of the references, 1 <= M <= 256. Returns mode [n] uint8, k, d and correlation [n] fp32, or fp64 for
    fp64 snapshots: the first of the modes with whose reference the trajectory correlates most, up to sign; the
    least-squares fit k * ref + d of the trajectory to it; the absolute value of the correlation, in [0, 1].

    One pass in fp64 over displacements from x_0, so that neither a large offset nor a small movement cancels; each sum
    in the order of t, unfused: all backends of a device agree to the bit, but for the reference's correlation, whose
    square root is torch's, within one unit in the last place of fp64. What does not move has mode 0, k = 0, d = its
    mean and correlation 0, and a reference that does not move correlates with nothing; a trajectory with a value that
    is not finite (or, in fp64, squares that are not) has mode 0, k = 0, d = its last value, correlation 0. k becomes
    infinite where its dtype cannot hold it. There are no gradients.

    Raises ValueError for shapes and layouts, TypeError for dtypes and devices, RuntimeError for an argument that
    requires grad outside no_grad, BackendError for a forced backend.
    Source: CMD (Brokman et al., 2023, arXiv:2312.13247); its published code correlates by raw moments in fp32.
    """
    f = "cmd_assign"
    for name, value in (("snapshots", snapshots), ("refs", refs)):
        _check.tensor(f, name, value)
        _check.no_gradient(f, name, [value])
        if value.dim() != 2:
            wanted = "[T, n]" if value is snapshots else "[M, T]"
            raise ValueError(
                f"{f}: {name} must have two dimensions {wanted}, got shape {list(value.shape)}; reshape it"
            )
    _check.dtype_in(f, "snapshots", snapshots, FLOATS)
    _check.dtype_in(f, "refs", refs, (torch.float64,))
    _check.same_device(f, ("snapshots", snapshots), ("refs", refs))
    epochs, n = snapshots.shape
    if not 2 <= epochs <= MOST_EPOCHS:
        raise ValueError(f"{f}: snapshots must have 2 to {MOST_EPOCHS} rows, got {epochs}; choose other epochs")
    if n > 1 and snapshots.stride(1) != 1:
        raise ValueError(
            f"{f}: elements of a row of snapshots must be adjacent, got a stride of {snapshots.stride(1)}; "
            "call .contiguous()"
        )
    if refs.shape[1] != epochs or not 1 <= len(refs) <= MOST_MODES:
        raise ValueError(
            f"{f}: refs must be [M, {epochs}] with 1 <= M <= {MOST_MODES}, got {list(refs.shape)}; "
            "give each reference's value in every snapshot"
        )
    return torch.ops.lic_fast.cmd_assign(snapshots, refs)


def embed_select(values: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """The `count` smallest of values where mask: selected [n] bool, min(count, candidates) of them True.

    values [n] fp32 or fp64; count an int >= 0; mask [n] bool, None = every element. A candidate is what is not NaN and
    where mask is True. -0.0 equals 0.0, of equal values the lowest index comes first: the result is that of a stable
    sort, on every device and for any number of threads. Reads values a few times (fp32: 4 to 5) and nothing is sorted;
    on CUDA nothing waits for the host. Strided arguments are copied. There are no gradients.

    Raises ValueError for shapes and count, TypeError for dtypes and devices, RuntimeError for values that require grad
    outside no_grad, BackendError for a forced backend.
    Source: which weights STDET (Zhang et al., TMLR 2025) embeds first, those that changed least; radix selection
    (Alabi et al., 2012).
    """
    f = "embed_select"
    _check.tensor(f, "values", values)
    _check.no_gradient(f, "values", [values])
    if values.dim() != 1:
        raise ValueError(f"{f}: values must have one dimension [n], got shape {list(values.shape)}; flatten it")
    _check.dtype_in(f, "values", values, SELECTED)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"{f}: count must be an int >= 0, got {count!r}; round it first")
    if mask is not None:
        _check.tensor(f, "mask", mask)
        _check.same_shape(f, ("values", values), ("mask", mask))
        _check.dtype_in(f, "mask", mask, (torch.bool,))
        _check.same_device(f, ("values", values), ("mask", mask))
    return torch.ops.lic_fast.embed_select(values, min(count, values.numel()), mask)


def rls_update_(
    params: Sequence[Tensor], code: Tensor, base: Tensor, k: Tensor, d: Tensor, gains: Tensor,
    change: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of recursive least squares of w ~ k r + d, at the end of an epoch, for all free embeddable elements.

    params: n tensors [*] of one dtype, fp32, bf16, fp16 or fp64, only read; code [places] uint8, base
    [places / 1024, 2] int64, k and d [E]: see FlatLayout; fp32, or fp64 for fp64 parameters. gains [M, 4] fp64 on their
    device, M <= 63, for each mode: the reference's value r, g0, g1 and norm = sqrt(g0^2 + g1^2), where T is the number
    of epochs, m the mean and S the sum of squared deviations of the reference over them, this one included;
    g0 = (r - m) / S, 0 where S is 0, and g1 = 1 / T - m g0. change: None, or [places] of k's dtype, written everywhere.

    With e = (w - k r) - d: k <- k + e g0, d <- d + e g1, change = |e| norm, the distance that (k, d) moves. So k and d
    stay the least-squares fit over all epochs once they are that over two or more with S > 0. Elements that are
    tied for a while (TIED but not STATELESS) keep k and d, their change is inf; those that are OUTSIDE or STATELESS,
    padding among them, have NaN. A mode outside [0, M) gives NaN in all three. Arithmetic in fp64, unfused, rounded
    once: all backends agree to the bit.

    Raises ValueError for shapes and tensors that share memory, TypeError for dtypes and devices, RuntimeError for an
    argument that requires grad outside no_grad, BackendError for a forced backend. What code and base say is not
    checked against each other, but that the C++ kernel raises RuntimeError where they lead outside k.
    Source: Correlation Mode Decomposition (arXiv 2312.13247), whose online form fits w_i = k_i w_ref + d_i in every
    epoch; written here as recursive least squares (Plackett, Biometrika 1950), which is exact.
    """
    f = "rls_update_"
    params = _check.tensor_list(f, "params", params)
    if not params:
        return
    wide = _check_layout(f, params, code, base, k, d)
    _flat_of(f, "gains", gains, torch.float64, params[0], None, 2)
    if gains.shape[1] != 4 or len(gains) > _layout.MOST_MODES:
        raise ValueError(f"{f}: gains must be [M, 4] with M <= {_layout.MOST_MODES}, got {list(gains.shape)}")
    written = [("k", k), ("d", d)]
    if change is not None:
        _flat_of(f, "change", change, wide, params[0], len(code))
        written.append(("change", change))
    _check.no_gradient(f, "k, d, gains or change", [gains, *(x for _, x in written)])
    for i, pair in enumerate(written):
        for other in (*written[:i], ("code", code), ("base", base), ("gains", gains)):
            _check.no_overlap(f, pair, other)
        for t, p in enumerate(params):
            _check.no_overlap(f, pair, (f"params[{t}]", p))
    torch.ops.lic_fast.rls_update_(params, code, base, k, d, gains, change)


def sensitivity_accumulate_(
    s: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor], *, kind: str = "taylor"
) -> None:
    """s <- s + |w g| ("taylor"), g g ("fisher") or |g| ("magnitude"), one launch for the whole list.

    params: n tensors [*] fp32, bf16, fp16 or fp64. grads: n tensors, each of its parameter's shape and dtype, or
    without elements where there is no gradient: s stays as it is. Both are only read. s: n contiguous tensors
    [numel], fp32, or fp64 for fp64 parameters: a parameter's elements in the order in which memory holds them
    (in_memory_order), so that s may be the parts of one flat tensor (FlatLayout.split). Arithmetic in s's dtype, the
    product and the sum rounded separately: all backends agree to the bit. A term that is not finite counts as 0.

    Raises ValueError for lengths, shapes, kind and tensors that share memory, TypeError for dtypes and devices,
    RuntimeError for an argument that requires grad outside no_grad, BackendError for a forced backend.
    Source: the first-order Taylor saliency E|w g| (Molchanov et al., ICLR 2017 and CVPR 2019), the diagonal of the
    empirical Fisher information, and the gradient's magnitude. By which of them STDET (Zhang et al., TMLR 2025)
    chooses what to embed is not public: taking the first as the default is a reconstruction.
    """
    f = "sensitivity_accumulate_"
    s, params, grads = (_check.tensor_list(f, n, x) for n, x in (("s", s), ("params", params), ("grads", grads)))
    if kind not in KINDS:
        raise ValueError(f"{f}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, values in (("s", s), ("params", params), ("grads", grads)):
        _check.no_gradient(f, name, values)
    if not attempt_sensitivity_(s, params, grads, KINDS.index(kind)):
        _check.same_length(f, ("params", params), ("s", s), ("grads", grads))
        for i, (total, p, g) in enumerate(zip(s, params, grads, strict=True)):
            _check_sensitivity(f, i, total, p, g)
            _check.same_device(f, ("params[0]", params[0]), (f"params[{i}]", p))
        for group in _by_dtype(SENSITIVITY, params):
            picked = [[xs[i] for i in group] for xs in (s, params, grads)]
            torch.ops.lic_fast.sensitivity_accumulate_(*picked, KINDS.index(kind))


def _check_sensitivity(f: str, i: int, s: Tensor, p: Tensor, g: Tensor) -> None:
    _check.dtype_in(f, f"params[{i}]", p, FLOATS)
    _check.dtype_in(f, f"s[{i}]", s, (torch.float64 if p.dtype is torch.float64 else torch.float32,))
    _check.same_device(f, (f"params[{i}]", p), (f"s[{i}]", s))
    if list(s.shape) != [p.numel()] or not s.is_contiguous():
        raise ValueError(
            f"{f}: s[{i}] must be contiguous of shape [{p.numel()}], got {list(s.shape)}; see in_memory_order"
        )
    _check.no_overlap(f, (f"s[{i}]", s), (f"params[{i}]", p))
    if g.numel():
        _check.same_shape(f, (f"params[{i}]", p), (f"grads[{i}]", g))
        _check.dtype_in(f, f"grads[{i}]", g, (p.dtype,))
        _check.same_device(f, (f"params[{i}]", p), (f"grads[{i}]", g))
        _check.no_overlap(f, (f"s[{i}]", s), (f"grads[{i}]", g))

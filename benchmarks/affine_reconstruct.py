"""affine_reconstruct: k * refs[mode] + d where tied, else w; in place, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import functional
from . import parameters
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

MODES = 10
_NOISE = 1e-3
_SPREAD = 0.05  # of the reference values, near that of convolution weights
_SEED = 11
_FLAT = "one flat tensor"


@dataclass(frozen=True)
class _Inputs:
    """Lists alike of w, k, d, mode and tied (None: every element), and refs [MODES].

    w0: what w is set back to. index: mode in the dtype that PyTorch looks up fastest, made untimed.
    """

    w: list[Tensor]
    k: list[Tensor]
    d: list[Tensor]
    mode: list[Tensor]
    index: list[Tensor]
    tied: list[Tensor] | None
    refs: Tensor
    w0: list[Tensor]

    def reset(self) -> None:
        """Puts the starting values of w back."""
        torch._foreach_copy_(self.w, self.w0)

    def masks(self) -> Sequence[Tensor | None]:
        """One mask or None a tensor."""
        return self.tied if self.tied is not None else [None] * len(self.w)

    def flat(self) -> _Inputs:
        """The same values as lists of one tensor."""

        def one(tensors: list[Tensor]) -> list[Tensor]:
            return [torch.cat([t.flatten() for t in tensors])]

        lists = {name: one(getattr(self, name)) for name in ("k", "d", "mode", "index", "w0")}
        tied = None if self.tied is None else one(self.tied)
        return replace(self, **lists, tied=tied, w=[t.clone() for t in lists["w0"]])


def _inputs(values: Sequence[Tensor], dtype: torch.dtype, percent: int) -> _Inputs:
    """d is what makes k * refs[mode] + d the weight again, up to a small perturbation."""
    generator = torch.Generator().manual_seed(_SEED)
    refs = _SPREAD * torch.randn(MODES, generator=generator)
    k, d, mode, tied = [], [], [], []
    for value in values:
        shape, device = value.shape, value.device
        factor = 1 + 0.1 * torch.randn(shape, generator=generator)
        which = torch.randint(MODES, shape, generator=generator, dtype=torch.uint8)
        noise = _NOISE * torch.randn(shape, generator=generator)
        rest = value.cpu().float() - factor * refs[which.long()] + noise
        k.append(factor.to(device, dtype))
        d.append(rest.to(device, dtype))
        mode.append(which.to(device))
        tied.append((torch.rand(shape, generator=generator) < percent / 100).to(device))
    w0 = [value.to(dtype) for value in values]
    return _Inputs(
        w=[t.clone() for t in w0],
        k=k,
        d=d,
        mode=mode,
        index=[m.int() for m in mode],
        tied=None if percent == 100 else tied,
        refs=refs.to(w0[0].device, dtype),
        w0=w0,
    )


def _eager_(x: _Inputs) -> None:
    for w, k, d, index, tied in zip(x.w, x.k, x.d, x.index, x.masks(), strict=True):
        looked_up = x.refs.index_select(0, index.flatten()).view(w.shape)
        value = torch.addcmul(d, k, looked_up)
        w.copy_(value if tied is None else torch.where(tied, value, w))


def _eager_flat_(x: _Inputs) -> None:
    """Without the temporaries: the look-up's buffer takes the value, and where writes into w."""
    w, k, d, tied = x.w[0], x.k[0], x.d[0], x.masks()[0]
    value = x.refs.index_select(0, x.index[0])
    if tied is None:
        torch.addcmul(d, k, value, out=w)
    else:
        torch.where(tied, torch.addcmul(d, k, value, out=value), w, out=w)


def _plain(w: Tensor, k: Tensor, d: Tensor, index: Tensor, refs: Tensor, tied: Tensor | None) -> Tensor:
    """The op on a flat tensor, differentiable, in PyTorch."""
    value = torch.addcmul(d, k, refs.index_select(0, index))
    return value if tied is None else torch.where(tied, value, w)


def _fused(w: Tensor, k: Tensor, d: Tensor, index: Tensor, refs: Tensor, tied: Tensor | None) -> Tensor:
    """The same as torch.compile fuses it."""
    value = k * refs.index_select(0, index.int()) + d
    return value if tied is None else torch.where(tied != 0, value, w)


def _fused_(w: Tensor, k: Tensor, d: Tensor, index: Tensor, refs: Tensor, tied: Tensor | None) -> None:
    w.copy_(_fused(w, k, d, index, refs, tied))


def _compiled_arguments(x: _Inputs) -> tuple[Any, ...]:
    """Of the flat inputs; index and mask in the dtypes that make the faster code.

    On CUDA their bytes as they are. On the CPU int32: over bytes, torch.compile generates loops without SIMD.
    """
    index, tied = x.mode[0], x.masks()[0]
    if not x.w[0].is_cuda:
        index, tied = x.index[0], None if tied is None else tied.int()
    return x.w[0], x.k[0], x.d[0], index, x.refs, tied


def _exact(x: _Inputs) -> list[Tensor]:
    refs = x.refs.double()
    values = []
    for w, k, d, mode, tied in zip(x.w0, x.k, x.d, x.mode, x.masks(), strict=True):
        value = k.double() * refs[mode.long()] + d.double()
        values.append(value if tied is None else torch.where(tied, value, w.double()))
    return values


def _scales(x: _Inputs) -> list[float]:
    top = 2 * magnitude(x.refs)
    return [magnitude(w, d) + top for w, d in zip(x.w0, x.d, strict=True)]


def _size(tensors: Sequence[Tensor] | None) -> int:
    return 0 if tensors is None else sum(t.numel() * t.element_size() for t in tensors)


def _forward_bytes(x: _Inputs) -> int:
    """k, d, mode and tied read, the result written; w read where some elements keep it."""
    kept = _size(x.w) if x.tied is not None else 0
    return _size(x.k) + _size(x.d) + _size(x.mode) + _size(x.tied) + _size(x.w) + kept


def _backward_bytes(x: _Inputs) -> int:
    """The gradient, k, mode and tied read; the gradients of k, d and, where some keep it, w written."""
    kept = _size(x.w) if x.tied is not None else 0
    return _size(x.w) + _size(x.mode) + _size(x.tied) + 3 * _size(x.k) + kept


def _flops(x: _Inputs, each: int) -> int:
    return each * sum(t.numel() for t in x.w)


def _in_place(x: _Inputs, flat: _Inputs, settings: Settings) -> tuple[list[Case], Expected, dict[str, str]]:
    moved, flops = _forward_bytes(x), _flops(x, 2)
    sizes = [t.numel() for t in x.w]

    def case(backend: str, run: Callable[[], Any], on: _Inputs) -> Case:
        def outputs(_: Any) -> list[Tensor]:
            if on is x:
                return x.w
            return [part.view(t.shape) for part, t in zip(on.w[0].split(sizes), x.w, strict=True)]

        return Case(backend, run, outputs, moved, flops, on.reset)

    def ours(on: _Inputs) -> Callable[[], None]:
        return lambda: functional.affine_reconstruct_(on.w, on.k, on.d, on.mode, on.refs, tied=on.tied)

    usable, left_out = backends("affine_reconstruct_", settings.device, x.w[0].dtype)
    cases = [case(OURS + backend, forced(backend, ours(x)), x) for backend in usable]
    cases += [case(f"{OURS}{b}, {_FLAT}", forced(b, ours(flat)), flat) for b in usable if b != "reference"]
    cases.append(case("eager, tensor by tensor", lambda: _eager_(x), x))
    cases.append(case(f"eager, {_FLAT}", lambda: _eager_flat_(flat), flat))
    reason = compile_why_not(settings.device)
    if reason is None:
        function, arguments = compiled(_fused_), _compiled_arguments(flat)
        cases.append(case(f"torch.compile, {_FLAT}", lambda: function(*arguments), flat))
    else:
        left_out["torch.compile"] = reason
    x.reset()
    _eager_(x)
    return cases, Expected.of(_exact(x), x.w, _scales(x)), left_out


def _forward(flat: _Inputs, settings: Settings) -> tuple[list[Case], Expected, dict[str, str]]:
    moved, flops = _forward_bytes(flat), _flops(flat, 2)
    w, k, d, mode, index, tied = (
        flat.w0[0],
        flat.k[0],
        flat.d[0],
        flat.mode[0],
        flat.index[0],
        flat.masks()[0],
    )

    def case(backend: str, run: Callable[[], Any]) -> Case:
        return Case(backend, run, lambda out: [out], moved, flops)

    def ours() -> Tensor:
        return functional.affine_reconstruct(w, k, d, mode, flat.refs, tied=tied)

    usable, left_out = backends("affine_reconstruct", settings.device, w.dtype)
    cases = [case(OURS + backend, forced(backend, ours)) for backend in usable]
    cases.append(case("eager", lambda: _plain(w, k, d, index, flat.refs, tied)))
    reason = compile_why_not(settings.device)
    if reason is None:
        function, arguments = compiled(_fused), (w, *_compiled_arguments(flat)[1:])
        cases.append(case("torch.compile", lambda: function(*arguments)))
    else:
        left_out["torch.compile"] = reason
    eager = _plain(w, k, d, index, flat.refs, tied)
    return cases, Expected.of(_exact(flat), [eager], _scales(flat)), left_out


def _exact_gradients(grad: Tensor, flat: _Inputs) -> tuple[list[Tensor], list[float]]:
    """The fp64 gradients of w (where some elements keep it), k, d and refs, and their scales."""
    mode, g, tied = flat.mode[0].long(), grad.double(), flat.masks()[0]
    reach = g if tied is None else torch.where(tied, g, 0.0)
    terms = flat.k[0].double() * reach
    zeros = flat.refs.new_zeros(MODES, dtype=torch.float64)
    sums = [zeros.index_add(0, mode, t) for t in (terms, terms.abs())]
    top = magnitude(grad)
    gradients = [reach * flat.refs.double()[mode], reach, sums[0]]
    scales = [top * magnitude(flat.refs), top, magnitude(sums[1])]
    return (gradients, scales) if tied is None else ([g - reach, *gradients], [top, *scales])


class _Graph:
    """A forward pass that is made anew before each backward pass is timed."""

    def __init__(self, forward: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> None:
        self._forward, self._leaves, self._grad = forward, leaves, grad
        self._out: Tensor | None = None

    def prepare(self) -> None:
        """Runs the forward pass."""
        self._out = self._forward()

    def run(self) -> tuple[Tensor, ...]:
        """Runs the backward pass, to every leaf."""
        return torch.autograd.grad(self._out, self._leaves, self._grad)


def _backward(flat: _Inputs, settings: Settings) -> tuple[list[Case], Expected, dict[str, str]]:
    moved, flops = _backward_bytes(flat), _flops(flat, 3)
    mode, index, tied = flat.mode[0], flat.index[0], flat.masks()[0]
    w, k, d, refs = (t.clone().requires_grad_() for t in (flat.w0[0], flat.k[0], flat.d[0], flat.refs))
    leaves = [k, d, refs] if tied is None else [w, k, d, refs]
    generator = torch.Generator().manual_seed(_SEED)
    grad = torch.randn(w.shape, generator=generator).to(w.device, w.dtype)

    def case(backend: str, graph: _Graph, run: Callable[[], Any] | None = None) -> Case:
        return Case(backend, run or graph.run, list, moved, flops, graph.prepare)

    usable, left_out = backends("affine_reconstruct_bwd", settings.device, w.dtype)
    ours = _Graph(lambda: functional.affine_reconstruct(w, k, d, mode, refs, tied=tied), leaves, grad)
    cases = [case(OURS + backend, ours, forced(backend, ours.run)) for backend in usable]
    eager = _Graph(lambda: _plain(w, k, d, index, refs, tied), leaves, grad)
    cases.append(case("eager", eager))
    reason = compile_why_not(settings.device)
    if reason is None:
        function, (*_, which, _, mask) = compiled(_fused), _compiled_arguments(flat)
        cases.append(case("torch.compile", _Graph(lambda: function(w, k, d, which, refs, mask), leaves, grad)))
    else:
        left_out["torch.compile"] = reason
    eager.prepare()
    exact, scales = _exact_gradients(grad, flat)
    return cases, Expected.of(exact, eager.run(), scales), left_out


def groups(settings: Settings) -> Iterator[Group]:
    """For each model, dtype and tied percentage: the list in place, one flat tensor forward and backward."""
    for name, model in settings.models.items():
        values = parameters.load(model, device=settings.device)
        for dtype in settings.dtypes:
            for percent in settings.tied:
                yield from _of_inputs(name, _inputs(values, DTYPES[dtype], percent), dtype, percent, settings)


def _of_inputs(name: str, x: _Inputs, dtype: str, percent: int, settings: Settings) -> Iterator[Group]:
    flat = x.flat()
    kinds = (
        ("in place", x, lambda: _in_place(x, flat, settings)),
        ("forward", flat, lambda: _forward(flat, settings)),
        ("backward", flat, lambda: _backward(flat, settings)),
    )
    for kind, inputs, build in kinds:
        forget_compiled()
        cases, expected, left_out = build()
        yield Group(
            op="affine_reconstruct",
            case=f"{kind}, {percent} % tied",
            inputs=parameters.label(name, inputs.w),
            dtype=dtype,
            device=settings.device,
            cases=cases,
            expected=expected,
            left_out=left_out,
        )

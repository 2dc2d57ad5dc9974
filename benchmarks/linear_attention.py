"""linear_attention_context: keys and values summed over the places, as CDC's U-Net runs it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import functional
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled, step
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

# [B, C, H, W] of k and of v: the first, third and last level of CDC's U-Net for a crop of 256
SHAPES = ((1, 64, 256, 256), (1, 192, 64, 64), (1, 384, 8, 8))
QUICK = ((1, 32, 16, 16),)
_SEED = 11


def _inputs(shape: Sequence[int], dtype: torch.dtype, last: bool, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """([k, v], gradient of the context); k and v are parts of what one convolution leaves, behind the queries."""
    g = torch.Generator().manual_seed(_SEED)
    B, C, *sides = shape
    layout = torch.channels_last if last else torch.contiguous_format
    whole = torch.randn((B, 3 * C, *sides), generator=g).to(device, dtype, memory_format=layout)
    return list(whole.chunk(3, 1)[1:]), torch.randn((B, C, C), generator=g).to(device, dtype)


def plain(k: Tensor, v: Tensor) -> Tensor:
    """In PyTorch's own operations, in k's dtype."""
    return torch.matmul(v.flatten(2), k.flatten(2).softmax(2).transpose(1, 2))


def _scales(k: Tensor, v: Tensor, grad: Tensor) -> list[float]:
    """The magnitudes of what is summed for the context and the gradients of k and v, where signs cancel."""
    values, grad = v.flatten(2).double().abs(), grad.double().abs()
    share = k.flatten(2).double().softmax(2)
    context = values @ share.transpose(1, 2)
    d_k = share * (grad.transpose(1, 2) @ values + (grad * context).sum(1)[:, :, None])
    return [magnitude(t) for t in (context, d_k, grad @ share)]


def _group(shape: Sequence[int], dtype: str, last: bool, trained: bool, settings: Settings) -> Group:
    values, grad = _inputs(shape, DTYPES[dtype], last, settings.device)
    given = grad if trained else None
    k = values[0]
    # k and v are read once forward and once backward, and two gradients written; one product forward, two backward
    moved = (6 if trained else 2) * k.nbytes + (3 if trained else 1) * grad.nbytes
    flops = (3 if trained else 1) * 2 * k.numel() * k.shape[1]

    def case(backend: str, run: Callable[[], list[Tensor]]) -> Case:
        return Case(backend, run, list, moved, flops)

    usable, left_out = backends("linear_attention_context", settings.device, k.dtype)
    ours = functional.linear_attention_context
    cases = [case(OURS + b, forced(b, step(ours, values, given))) for b in usable]
    cases.append(case("eager", step(plain, values, given)))
    reason = compile_why_not(settings.device)
    if reason is None:
        cases.append(case("torch.compile", step(compiled(plain), values, given)))
    else:
        left_out["torch.compile"] = reason
    exact = step(plain, [t.double() for t in values], given if given is None else given.double())()
    eager = step(plain, values, given)()
    return Group(
        op="linear_attention",
        case=f"{'forward and backward' if trained else 'forward'}, {'channels_last' if last else 'contiguous'}",
        inputs=str(list(shape)),
        dtype=dtype,
        device=settings.device,
        cases=cases,
        expected=Expected.of(exact, eager, _scales(*values, grad)[: len(exact)]),
        left_out=left_out,
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a shape, dtype, memory format and direction; the shapes are layers' and do not depend on the models."""
    for shape in QUICK if settings.quick else SHAPES:
        for dtype in settings.dtypes:
            for last in (True, False):
                for trained in (False, True):
                    forget_compiled()
                    yield _group(shape, dtype, last, trained, settings)

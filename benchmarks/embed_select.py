"""embed_select: which third of a model's weights changed least, ties by index."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..functional import embed_select
from . import parameters
from ._contenders import backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings

_SEED = 13
_LIKELY = 0.9  # of the elements are candidates


def _stable_sort(values: Tensor, count: int, mask: Tensor) -> Tensor:
    order = torch.sort(torch.where(mask, values, torch.inf), stable=True).indices[:count]
    return torch.zeros_like(mask).index_fill_(0, order, True)


def _topk(values: Tensor, count: int, mask: Tensor) -> Tensor:
    order = torch.topk(torch.where(mask, values, torch.inf), count, largest=False, sorted=False).indices
    return torch.zeros_like(mask).index_fill_(0, order, True)


def _kthvalue(values: Tensor, count: int, mask: Tensor) -> Tensor:
    masked = torch.where(mask, values, torch.inf)
    threshold = torch.kthvalue(masked, count).values
    below, ties = masked < threshold, masked == threshold
    return below | (ties & (ties.cumsum(0) <= count - below.sum()))


def _peers(case: Callable[..., Case], inputs: tuple, settings: Settings, has_ties: bool) -> tuple[list, dict]:
    peers = [
        case("torch.sort(stable)", lambda: _stable_sort(*inputs)),
        case("torch.kthvalue, cumsum of ties", lambda: _kthvalue(*inputs)),
    ]
    left_out = {}
    if has_ties:
        left_out["torch.topk"] = "it takes any of the ties"
    else:
        peers.append(case("torch.topk", lambda: _topk(*inputs)))
    reason = compile_why_not(settings.device)
    if reason is not None:
        return peers, {**left_out, "torch.compile": reason}
    whole = compiled(_kthvalue)
    return [*peers, case("torch.compile(kthvalue)", lambda: whole(*inputs))], left_out


def _group(name: str, kind: str, values: Tensor, settings: Settings) -> Group:
    n = values.numel()
    count = max(1, n // 3)
    generator = torch.Generator().manual_seed(_SEED)
    mask = (torch.rand(n, generator=generator) < _LIKELY).to(values.device)
    inputs = (values, count, mask)

    def case(backend: str, run: Callable[[], Tensor]) -> Case:
        return Case(backend, run, lambda selected: [selected.float()], n * (values.element_size() + 2), n)

    usable, left_out = backends("embed_select", settings.device, values.dtype)
    ours = [case(OURS + b, forced(b, lambda: embed_select(*inputs))) for b in usable]
    peers, missing = _peers(case, inputs, settings, kind == "ties")
    exact = _stable_sort(values.double(), count, mask).double()
    return Group(
        op="embed_select",
        case=f"a third, {kind}",
        inputs=f"{name} ({n} elements)",
        dtype="fp32",
        device=settings.device,
        cases=[*ours, *peers],
        expected=Expected([exact], [0.0], [torch.float32]),
        left_out={**left_out, **missing},
    )


def _scores(n: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """How far weights moved: distinct values (a permutation), and the same rounded to 256 levels."""
    generator = torch.Generator().manual_seed(_SEED)
    places = torch.randperm(n, generator=generator)
    # distinct bits of floats that spread over a dozen powers of two
    step = max(1, (12 << 23) // n)
    values = (places.to(torch.int32) * step + (115 << 23)).view(torch.float32)
    yield "distinct", values.to(device)
    yield "ties", (places % 256).float().to(device)


def groups(settings: Settings) -> Iterator[Group]:
    """Two groups a model, with and without ties; fp32 scores whatever the dtype; --quick takes an eighth."""
    for name, model in settings.models.items():
        n = sum(t.numel() for t in parameters.load(model))
        for kind, values in _scores(-(-n // 8) if settings.quick else n, settings.device):
            forget_compiled()
            yield _group(name, kind, values, settings)

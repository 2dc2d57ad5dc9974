"""cmd_assign: the mode of every weight of a model by correlation of trajectories, and its affine fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import cmd_assign
from . import parameters
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

EPOCHS, MODES = 20, 10
_BLOCK = 1 << 20  # elements that are drawn at a time
_SEED = 11


def _references(device: torch.device) -> Tensor:
    """Half waves of MODES frequencies: they correlate with one another not at all, so that every mode is certain."""
    t = torch.arange(EPOCHS, dtype=torch.float64) + 0.5
    m = torch.arange(1, MODES + 1, dtype=torch.float64)
    return torch.cos(math.pi / EPOCHS * m[:, None] * t[None, :]).to(device)


def _snapshots(n: int, refs: Tensor, dtype: torch.dtype) -> Tensor:
    """[EPOCHS, n]: each weight follows one of the references, with noise of a twentieth of its movement."""
    generator = torch.Generator().manual_seed(_SEED)
    result = torch.empty((EPOCHS, n), dtype=dtype, device=refs.device)
    table = refs.float().cpu().T.contiguous()
    for part in result.split(_BLOCK, dim=1):
        size = part.shape[1]
        pick = torch.randint(0, MODES, (size,), generator=generator)
        noise = 0.05 * (2 * torch.rand((EPOCHS, size), generator=generator) - 1)
        part.copy_(1e-2 * (1 + torch.rand(size, generator=generator)) * (table[:, pick] + noise))
    return result


def _eager(snapshots: Tensor, refs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre, one matrix product, argmax: in fp32, with the centred copy and all correlations in memory."""
    x = snapshots.float()
    r = refs.float()
    mean, level = r.mean(1, keepdim=True), x.mean(0)
    centred = r - mean
    norm = centred.norm(dim=1)
    x = x - level
    num = (centred / norm[:, None]) @ x
    size, mode = num.abs().max(0)
    k = num.gather(0, mode[None])[0] / norm[mode]
    return mode.to(torch.uint8), k, level - k * mean[mode, 0], size / x.norm(dim=0)


def _floats(assigned: Sequence[Tensor]) -> list[Tensor]:
    """The harness poisons and compares floating-point results."""
    return [assigned[0].float(), *assigned[1:]]


def _expected(snapshots: Tensor, refs: Tensor) -> Expected:
    with_reference = forced("reference", lambda: cmd_assign(snapshots, refs))
    exact = [part.double() for part in with_reference()]
    eager = [torch.cat(parts) for parts in zip(*(_eager(x, refs) for x in snapshots.split(_BLOCK, 1)), strict=True)]
    return Expected.of(exact, _floats(eager), [0.0, *(magnitude(part) for part in exact[1:])])


def _peers(case: Callable[..., Case], snapshots: Tensor, refs: Tensor, device: torch.device) -> tuple[list, dict]:
    peers = [case("eager (centre, matmul, argmax)", lambda: _eager(snapshots, refs))]
    reason = compile_why_not(device)
    if reason is not None:
        return peers, {"torch.compile": reason}
    whole = compiled(_eager)
    return [*peers, case("torch.compile", lambda: whole(snapshots, refs))], {}


def _group(name: str, n: int, dtype: str, settings: Settings) -> Group:
    refs = _references(settings.device)
    snapshots = _snapshots(n, refs, DTYPES[dtype])
    moved = snapshots.numel() * snapshots.element_size() + 13 * n
    flops = n * (EPOCHS - 1) * (2 * MODES + 4)

    def case(backend: str, run: Callable[[], tuple[Tensor, ...]]) -> Case:
        return Case(backend, run, _floats, moved, flops)

    usable, left_out = backends("cmd_assign", settings.device, snapshots.dtype)
    ours = [case(OURS + b, forced(b, lambda: cmd_assign(snapshots, refs))) for b in usable]
    peers, missing = _peers(case, snapshots, refs, settings.device)
    return Group(
        op="cmd_assign",
        case=f"{EPOCHS} epochs, {MODES} modes",
        inputs=f"{name} ({n} elements)",
        dtype=dtype,
        device=settings.device,
        cases=[*ours, *peers],
        expected=_expected(snapshots, refs),
        left_out={**left_out, **missing},
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a model and dtype of the snapshots; --quick takes an eighth of the elements."""
    for name, model in settings.models.items():
        n = sum(t.numel() for t in parameters.load(model))
        for dtype in settings.dtypes:
            forget_compiled()
            yield _group(name, -(-n // 8) if settings.quick else n, dtype, settings)

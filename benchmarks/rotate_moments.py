"""rotate_moments_: Adam's averages carried into refreshed eigenbases, in place, with reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import refresh_eigenbasis, rotate_moments_
from ..reference.rotate_moments import rotate_moments_ as specification
from . import parameters
from ._contenders import backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude
from ._soap_inputs import Walked, tensors, turned

# The averages of the tensors of one shape, stacked; for each axis a rotation [N, d, d] and an order [N, d], or None.
Stack = tuple[Tensor, Tensor, list[Tensor | None], list[Tensor | None]]


def _stacks(state: Walked) -> list[Stack]:
    stacks = []
    for a in state.alike:
        rotations: list[Tensor | None] = []
        orders: list[Tensor | None] = []
        for GG, Q in zip(a.GG, a.Q, strict=True):
            if GG is None:
                rotations.append(None)
                orders.append(None)
            else:
                _, (order,), (rotation,), _ = refresh_eigenbasis([GG], [Q], method="qr")
                rotations.append(rotation.contiguous())
                orders.append(order)
        stacks.append((a.exp_avg, a.exp_avg_sq, rotations, orders))
    return stacks


def _lists(state: Walked, stacks: Sequence[Stack]) -> tuple[list[Tensor], ...]:
    """(exp_avg, exp_avg_sq, rotation, order) as the op takes them."""
    none = torch.empty(0, 0, device=state.device)
    nowhere = torch.empty(0, dtype=torch.int64, device=state.device)
    found = {}
    for a, (_, _, rotations, orders) in zip(state.alike, stacks, strict=True):
        for row, i in enumerate(a.places):
            found[i] = (
                [none if r is None else r[row] for r in rotations],
                [nowhere if o is None else o[row] for o in orders],
            )
    by_tensor = [found[i] for i in range(len(found))]
    rotation, order = ([x for both in by_tensor for x in both[side]] for side in (0, 1))
    return state.exp_avg, state.exp_avg_sq, rotation, order


def _batched(stacks: Sequence[Stack]) -> None:
    """The same in PyTorch, batched by shape: one bmm and one gather for each axis of each shape."""
    for m, v, rotations, orders in stacks:
        m.copy_(turned(m, rotations))
        sorted_v = v
        for axis, order in enumerate(orders):
            if order is not None:
                shape = [len(v), *(order.shape[1] if a == axis else 1 for a in range(v.dim() - 1))]
                sorted_v = sorted_v.gather(axis + 1, order.view(shape).expand(v.shape))
        v.copy_(sorted_v)


def _expected(lists: Sequence[list[Tensor]]) -> Expected:
    wide = [[x.double() for x in tensors] for tensors in lists[:3]]
    specification(*wide, lists[3])
    exact = [*wide[0], *wide[1]]
    eager = [[x.clone() for x in tensors] for tensors in lists[:2]]
    specification(*eager, *lists[2:])
    return Expected.of(exact, [*eager[0], *eager[1]], [magnitude(x) for x in exact])


def _peers(case: Callable[..., Case], stacks: Sequence[Stack], settings: Settings) -> tuple[list[Case], dict[str, str]]:
    peers = [case("torch.bmm and gather, batched by shape", lambda: _batched(stacks))]
    reason = compile_why_not(settings.device)
    if reason is None and settings.quick:
        reason = "it compiles for a minute; --quick leaves it out"
    if reason is not None:
        return peers, {"torch.compile, batched by shape": reason}
    whole = compiled(_batched)
    return [*peers, case("torch.compile, batched by shape", lambda: whole(stacks))], {}


def _group(name: str, values: Sequence[Tensor], settings: Settings) -> Group:
    state = Walked(values, torch.float32)
    stacks = _stacks(state)
    lists = _lists(state, stacks)
    m, v, rotation, order = lists
    moved = sum(2 * x.nbytes for x in [*m, *v]) + sum(x.nbytes for x in [*rotation, *order])
    flops = sum(2 * x.numel() * sum(x.shape) for x in m)

    def case(backend: str, run: Callable[[], None]) -> Case:
        return Case(backend, run, lambda _: [*m, *v], moved, flops, state.reset)

    usable, left_out = backends("rotate_moments_", settings.device, torch.float32)
    peers, missing = _peers(case, stacks, settings)
    return Group(
        op="rotate_moments",
        case="after a refresh of every factor",
        inputs=parameters.label(name, m),
        dtype="fp32",
        device=settings.device,
        cases=[*(case(OURS + b, forced(b, lambda: rotate_moments_(*lists))) for b in usable), *peers],
        expected=_expected(lists),
        left_out={**left_out, **missing},
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a model, in fp32: SOAP's state has that dtype for every dtype of the weights but fp64."""
    for name, model in settings.models.items():
        forget_compiled()
        yield _group(name, tensors(model, settings), settings)

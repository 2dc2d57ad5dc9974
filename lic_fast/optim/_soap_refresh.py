"""The refresh of SOAP's eigenbases: which matrices, in how many portions, and what follows for the moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import OPS
from ..functional import refresh_eigenbasis, rotate_moments_
from ._soap_state import FactorStack, Slot

COPIES = 8  # matrices of a factor's size that a refresh holds at once, counted in GG's dtype


def first_bases_(slots: Sequence[Slot], groups: Sequence[dict[str, Any]]) -> None:
    """GG <- (1 - shampoo_beta) * (the gradient's Gram matrix), Q <- its eigenvectors, largest eigenvalue first."""
    stacks: list[FactorStack] = []
    for slot in slots:
        if not slot.factors:
            continue
        group = groups[slot.group]
        beta = group["shampoo_beta"] if group["shampoo_beta"] >= 0 else group["betas"][1]
        gradient = slot.plan.merge(slot.param.grad.to(slot.exp_avg.dtype))
        for factor, axis, place in zip(slot.GG, slot.plan.order, slot.factors, strict=True):
            if place is not None:
                factor.lerp_(_gram(gradient, axis), 1.0 - beta)
                stacks.append(place[0])
    for stack in dict.fromkeys(stacks):
        stack.Q.copy_(_eigenvectors(stack.GG))


def _gram(x: Tensor, axis: int) -> Tensor:
    """The products over all other axes; taken as nikhilvyas/SOAP takes them, because the eigenvectors of a matrix
    without full rank, as the first one often is, hang on its last bits. On a GPU in fp64, out of TF32's reach.
    """
    wide = x.double() if x.device.type == "cuda" else x
    others = [a for a in range(x.dim()) if a != axis]
    return torch.tensordot(wide, wide, dims=(others, others)).to(x.dtype)


def _eigenvectors(GG: Tensor) -> Tensor:
    shifted = GG + 1e-30 * torch.eye(GG.shape[-1], dtype=GG.dtype, device=GG.device)
    try:
        vectors = torch.linalg.eigh(shifted).eigenvectors
    except torch.linalg.LinAlgError:  # fp32 does not always converge on singular matrices
        vectors = torch.linalg.eigh(shifted.double()).eigenvectors.to(GG.dtype)
    return vectors.flip(-1)


def spread(new: Sequence[Slot], old: Sequence[Slot], groups: Sequence[dict[str, Any]]) -> None:
    """Gives each new parameter a phase, so that the refreshes between two of its own cost about the same every step."""
    load: dict[int, list[int]] = {}
    for slot in (*old, *sorted(new, key=lambda slot: -slot.plan.refresh_flops())):
        every = groups[slot.group]["precondition_frequency"]
        costs = load.setdefault(every, [0] * every)
        if slot not in old:
            slot.phase = costs.index(min(costs))
        costs[slot.phase % every] += slot.plan.refresh_flops()


def refresh_(due: Sequence[Slot], method: str, most_bytes: int | None) -> None:
    """Refreshes every factor of the parameters `due` and carries their moments over."""
    for portion in _portions(due, most_bytes):
        _refresh_portion(portion, method)


def _portions(due: Sequence[Slot], most_bytes: int | None) -> list[list[Slot]]:
    if most_bytes is None:
        return [list(due)]
    portions: list[list[Slot]] = [[]]
    held = 0
    for slot in due:
        needed = sum(COPIES * gg.numel() * gg.element_size() for gg in slot.GG) + 2 * slot.exp_avg.nbytes
        if portions[-1] and held + needed > most_bytes:
            portions.append([])
            held = 0
        portions[-1].append(slot)
        held += needed
    return portions


def _refresh_portion(slots: list[Slot], method: str) -> None:
    rows: dict[FactorStack, list[int]] = {}
    for slot in slots:
        for place in slot.factors:
            if place is not None:
                rows.setdefault(place[0], []).append(place[1])
    stacks = list(rows)
    whole = [sorted(rows[stack]) == list(range(len(stack.GG))) for stack in stacks]
    picked = [
        None if all_of_it else stack.rows(tuple(rows[stack])) for stack, all_of_it in zip(stacks, whole, strict=True)
    ]
    results: dict[FactorStack, tuple[Tensor, Tensor]] = {}
    for places in _by_kind(stacks):
        GG = [stacks[i].GG if whole[i] else stacks[i].GG.index_select(0, picked[i]) for i in places]
        Q = [stacks[i].Q if whole[i] else stacks[i].Q.index_select(0, picked[i]) for i in places]
        new, order, rotation, _ = refresh_eigenbasis(GG, Q, method=_resolved(method, GG[0]))
        for i, basis, o, r in zip(places, new, order, rotation, strict=True):
            if whole[i]:
                stacks[i].Q.copy_(basis)
            else:
                stacks[i].Q.index_copy_(0, picked[i], basis)
            results[stacks[i]] = (r, o)
    found = {
        stack: {row: i for i, row in enumerate(range(len(stack.GG)) if all_of_it else rows[stack])}
        for stack, all_of_it in zip(stacks, whole, strict=True)
    }
    _rotate(slots, results, found)


def _rotate(
    slots: list[Slot],
    results: dict[FactorStack, tuple[Tensor, Tensor]],
    found: dict[FactorStack, dict[int, int]],
) -> None:
    alike: dict[Any, list[Slot]] = {}
    for slot in slots:
        alike.setdefault((slot.exp_avg.device, slot.exp_avg.dtype), []).append(slot)
    for members in alike.values():
        none = members[0].exp_avg.new_empty(0, 0)
        nowhere = torch.empty(0, dtype=torch.int64, device=none.device)
        rotations, orders = [], []
        for slot in members:
            for place in slot.factors:
                if place is None:
                    rotations.append(none)
                    orders.append(nowhere)
                else:
                    stack, row = place
                    rotations.append(results[stack][0][found[stack][row]])
                    orders.append(results[stack][1][found[stack][row]])
        rotate_moments_([s.exp_avg for s in members], [s.exp_avg_sq for s in members], rotations, orders)


def _by_kind(stacks: list[FactorStack]) -> list[list[int]]:
    """Places grouped by device and dtype: what one call takes."""
    groups: dict[Any, list[int]] = {}
    for i, stack in enumerate(stacks):
        groups.setdefault((stack.GG.device, stack.GG.dtype), []).append(i)
    return list(groups.values())


def _resolved(method: str, like: Tensor) -> str:
    """The method that "auto" stands for: Cholesky-QR, but LAPACK's QR where the CPU has no kernel for the former."""
    if method != "auto":
        return method
    if like.device.type != "cpu":
        return "cholesky_qr"
    return "cholesky_qr" if OPS["refresh_eigenbasis"].choose("cpu", like.dtype) == "cpp" else "qr"

"""Which weights follow a reference, with which coefficients, and how the set grows at the ends of epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import FlatLayout, embed_select, in_memory_order, rls_update_, stdet_reconstruct_
from ._stdet_snapshots import Modes, Snapshots

TIED, STATELESS, OUTSIDE = FlatLayout.TIED, FlatLayout.STATELESS, FlatLayout.OUTSIDE


class Embedding:
    """code, k, d and the references of a model after its warm-up (FlatLayout), and how many weights are embedded.

    On the device, for each weight: a byte of code, and k and d where it is embeddable. true counts weights that are
    embedded for good, dummy those drawn at the last event.
    """

    def __init__(self, layout: FlatLayout, modes: Modes, code: Tensor, k: Tensor, d: Tensor) -> None:
        self.layout, self.modes, self.code, self.k, self.d = layout, modes, code, k, d
        self.embeddable, self.true, self.dummy = len(k), 0, 0
        self._frozen = False  # whether the dummies are tied until the next event
        self._previous: tuple[Tensor, Tensor] | None = None  # k and d at the last event, on the host
        tensor = torch.searchsorted(torch.tensor(layout.starts[1:]), modes.places, right=True)
        self._refs = torch.stack([tensor, modes.places - torch.tensor(layout.starts)[tensor]], 1)
        self.refresh()

    @classmethod
    def find(cls, snapshots: Snapshots, modes: int, sensitivity: Tensor, share: float, weights: int) -> Embedding:
        """The least sensitive `share` of `weights` becomes embeddable; their modes and coefficients by CMD.

        sensitivity [places], NaN where a place is none of the weights.
        """
        found = snapshots.find_modes(modes)
        sensitivity[found.places.to(sensitivity.device)] = float("nan")  # references are never tied
        embeddable = embed_select(sensitivity, int(share * weights))
        return cls(snapshots.layout, found, *snapshots.assign(found, embeddable))

    def refresh(self) -> None:
        """Recomputes what follows from code: base, and the references' places among the moments."""
        self.base = self.layout.base_of(self.code)
        places = self.modes.places.to(self.code.device)
        block, within = places // FlatLayout.BLOCK, places % FlatLayout.BLOCK
        has = self.code.view(-1, FlatLayout.BLOCK)[block] & STATELESS == 0
        before = torch.arange(FlatLayout.BLOCK, device=self.code.device) < within[:, None]
        slots = self.base[block, 0] + (has & before).sum(1)
        self.refs = torch.cat([self._refs.to(self.code.device), slots[:, None]], 1)

    @property
    def ties(self) -> bool:
        """Whether a step has weights to rebuild."""
        return self.true > 0 or self._frozen

    def reference_values(self, values: Sequence[Tensor]) -> Tensor:
        """[M] fp64 on the CPU: what the references hold in `values`."""
        rows = [in_memory_order(values[tensor])[element] for tensor, element in self._refs.tolist()]
        return torch.stack(rows).double().cpu()

    def learn(self, values: Sequence[Tensor]) -> Tensor:
        """Moves k and d of weights that are not embedded to the least-squares fit over one epoch more.

        Returns [places]: how much the two have moved; NaN where a weight cannot be embedded, infinity for dummies that
        were tied. An infinity is selected last.
        """
        gains = self.modes.sums.gains(self.reference_values(values)).to(self.code.device)
        change = torch.empty(self.layout.starts[-1], dtype=self.k.dtype, device=self.code.device)
        rls_update_(values, self.code, self.base, self.k, self.d, gains, change)
        return change

    def remember(self) -> None:
        """Keeps k and d of now on the host: for changes over more than one epoch."""
        self._previous = (self.k.cpu().clone(), self.d.cpu().clone())

    def change_since(self, change: Tensor) -> None:
        """Puts how much k and d have moved since `remember` into the finite elements of `change`."""
        device = self.code.device
        parts = zip(self.layout.split(self.code), self.layout.split(change), self._slices(), strict=True)
        for code, moved, part in parts:
            embeddable = code & OUTSIDE != OUTSIDE
            now = moved[embeddable]
            k, d = (old[part].to(device) for old in self._previous)
            since = torch.hypot(self.k[part] - k, self.d[part] - d)
            moved[embeddable] = torch.where(now.isfinite(), since, now)

    def _slices(self) -> list[slice]:
        return [place.coefficients for place in self.layout.places(self.base, 0, len(self.k))]

    def draw(self, change: Tensor, more: int, dummies: int) -> tuple[Tensor, Tensor]:
        """(embedded for good from now on, dummies), [places] bool: the weights whose coefficients moved least."""
        true = embed_select(change, more)
        return true, embed_select(change, more + dummies).bitwise_xor_(true)

    def release_dummies(self) -> None:
        """Dummies that were tied are free again."""
        if self._frozen:
            frozen = (self.code & (TIED | STATELESS)) == TIED
            self.code.bitwise_xor_(frozen.to(torch.uint8).mul_(TIED))
            self._frozen = False

    def embed(self, true: Tensor, dummies: Tensor, freeze: bool) -> None:
        """Marks weights as embedded for good, and dummies as tied until the next event where `freeze`."""
        self.code.bitwise_or_(true.to(torch.uint8).mul_(TIED | STATELESS))
        self.true, self.dummy = self.true + int(true.count_nonzero()), int(dummies.count_nonzero())
        if freeze:
            self.code.bitwise_or_(dummies.to(torch.uint8).mul_(TIED))
            self._frozen = self.dummy > 0
        self.refresh()

    def continue_from(self, true: Tensor, params: Sequence[Tensor]) -> None:
        """d <- w - k r for the weights of `true`: embedding them does not move them."""
        r = torch.zeros(OUTSIDE + 1, dtype=self.k.dtype)
        r[: len(self._refs)] = self.reference_values(params).to(self.k.dtype)
        r = r.to(self.code.device)
        parts = zip(params, self.layout.split(self.code), self.layout.split(true), self._slices(), strict=True)
        for p, code, chosen, part in parts:
            places = chosen[code & OUTSIDE != OUTSIDE]
            w = in_memory_order(p)[chosen].to(self.k.dtype)
            self.d[part][places] = w - self.k[part][places] * r[(code[chosen] & OUTSIDE).long()]

    def rebuild(self, values: Sequence[Tensor], dummies: Tensor | None = None) -> None:
        """Tied weights, and those of `dummies` [places] bool, become k r + d in `values`."""
        code = self.code if dummies is None else self.code | dummies.to(torch.uint8).mul_(TIED)
        stdet_reconstruct_(values, code, self.base, self.k, self.d, self.refs)

    def add_chain(self, params: Sequence[Tensor]) -> None:
        """Adds to each reference's gradient what its tied weights send it: the sum of k * gradient."""
        sums = torch.zeros(OUTSIDE + 1, dtype=torch.float64, device=self.code.device)
        for p, code, part in zip(params, self.layout.split(self.code), self._slices(), strict=True):
            if p.grad is None:
                continue
            tied = code & TIED != 0
            k = self.k[part][tied[code & OUTSIDE != OUTSIDE]]
            term = k.double() * in_memory_order(p.grad)[tied].double()
            sums.index_add_(0, (code[tied] & OUTSIDE).long(), term)
        for mode, (tensor, element) in enumerate(self._refs.tolist()):
            p = params[tensor]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            in_memory_order(p.grad)[element] += sums[mode].to(p.dtype)

    def coefficients_at(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mode int64, k, d fp64) of flat places on the CPU; mode -1 where a weight is never embedded."""
        code = self.code.cpu()
        embeddable = code & OUTSIDE != OUTSIDE
        slot = embeddable.cumsum(0)[places] - 1
        inside = embeddable[places]
        mode = torch.where(inside, (code[places] & OUTSIDE).long(), -1)
        k, d = (torch.where(inside, x.cpu()[slot.clamp(min=0)].double(), torch.nan) for x in (self.k, self.d))
        return mode, k, d

    def bytes(self) -> int:
        """On the device: code, base, k, d."""
        return sum(x.numel() * x.element_size() for x in (self.code, self.base, self.k, self.d))

    def host_bytes(self) -> int:
        """What remember() keeps."""
        return sum(x.numel() * x.element_size() for x in self._previous or ())

    def state_dict(self) -> dict[str, Any]:
        return {
            "modes": self.modes.state_dict(), "code": self.code, "k": self.k, "d": self.d, "true": self.true,
            "dummy": self.dummy, "frozen": self._frozen, "previous": self._previous,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any], layout: FlatLayout, device: torch.device) -> Embedding:
        """Raises ValueError where it does not fit the layout."""
        modes = Modes.from_state(state["modes"])
        code, places = state["code"], layout.starts[-1]
        known = code.dtype is torch.uint8 and list(code.shape) == [places]
        if not known or not ((modes.places >= 0) & (modes.places < places)).all():
            raise ValueError("code or references do not fit")
        if not list(state["k"].shape) == list(state["d"].shape) == [int((code & OUTSIDE != OUTSIDE).sum())]:
            raise ValueError("k and d do not fit")
        embedding = cls(layout, modes, *(state[name].to(device, copy=True) for name in ("code", "k", "d")))
        embedding.true, embedding.dummy = int(state["true"]), int(state["dummy"])
        embedding._frozen, embedding._previous = bool(state["frozen"]), state["previous"]
        return embedding

"""lic_fast::rotate_moments_: Adam's moments carried from one eigenbasis to the next, over a list of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, before_falling_back, register
from ..reference.rotate_moments import rotate_moments_ as reference
from ._library import define, mark_changed

DTYPES = (torch.float32, torch.float64)


def _cpp(*args: list[Tensor]) -> None:
    if not _native.op("cpp", "rotate_moments_")(*args):  # it has looked at what Python has not: the entries of order
        raise ValueError("rotate_moments_: an entry of order lies outside its axis; take what refresh_eigenbasis gave")


def _run_triton(*args: list[Tensor]) -> None:
    if not _triton.kernels("rotate_moments").rotate_moments_(*args):
        before_falling_back("rotate_moments_", "it does not take these tensors")
        reference(*args)


SPEC = register(
    OpSpec(
        "rotate_moments_",
        {
            "triton": Impl(_run_triton, ("cuda", "cpu"), DTYPES, _triton.why_not),
            "cpp": Impl(_cpp, ("cpu",), DTYPES, lambda device: _native.why_not("cpp", device)),
            "reference": Impl(reference, None, DTYPES),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def _op(exp_avg: list[Tensor], exp_avg_sq: list[Tensor], rotation: list[Tensor], order: list[Tensor]) -> None:
    if exp_avg:
        SPEC(exp_avg[0], exp_avg, exp_avg_sq, rotation, order)
        mark_changed([*exp_avg, *exp_avg_sq])


def _fake(*args: object) -> None:
    return None


define(
    "rotate_moments_(Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor[] rotation, Tensor[] order) -> ()",
    _op,
    _fake,
)

"""The noising of diffusion training, its weighted loss and the gradient, a launch each:

    noisy = signal x + spread n;   loss = mean of weight e^2, or weight |e|,  e = f - target;   d_f = scale e

A program takes a part of one sample. n, standard normal noise, and a target that is n, exist in registers only. Of the
loss a program adds its part, and PyTorch adds the parts, in fp64: no atomics, the same bits in every run. FP fusion is
off: rounds like eager PyTorch. Takes fp32, bf16, fp16 and fp64; tensors [B, *] dense, one sample after the other and in
one order, row-major where there is noise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rates
from .ddim_update import WIDE, normal_of
from .rates import load, noise, store

BLOCK = 1024


@triton.jit
def _part(n, parts, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """(sample, the program's first element among all, its places from there on, their mask)."""
    _, n, sample, part = rates.program(1, n, parts, VECTOR)
    first = part * BLOCK
    return sample, sample * n + first, rates.places(BLOCK, 1, BLOCK), rates.inside(1, n - first, 1, BLOCK)


@triton.jit
def _normal(seed, first, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    return normal_of(noise(seed, first, BLOCK, tl.float32, 1, BLOCK, VECTOR))


@triton.jit
def _error(
    f, x, seed, first, places, mask, WIDE: tl.constexpr, TARGET: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if TARGET:
        target = load(x, first, places, mask, WIDE, VECTOR)
    else:
        target = _normal(seed, first, VECTOR, BLOCK).to(WIDE)
    return load(f, first, places, mask, WIDE, VECTOR) - target


@triton.jit
def q_sample_kernel(
    x, signal, spread, seed, out, n, parts, WIDE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    sample, first, places, mask = _part(n, parts, VECTOR, BLOCK)
    value = load(x, first, places, mask, WIDE, VECTOR) * tl.load(signal + sample)
    value += _normal(seed, first, VECTOR, BLOCK).to(WIDE) * tl.load(spread + sample)
    store(out, first, places, value, mask, VECTOR)


@triton.jit
def q_sample_loss_kernel(
    f, x, seed, sums, n, parts,
    WIDE: tl.constexpr, TARGET: tl.constexpr, ABSOLUTE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, first, places, mask = _part(n, parts, VECTOR, BLOCK)
    error = _error(f, x, seed, first, places, mask, WIDE, TARGET, VECTOR, BLOCK)
    term = tl.abs(error) if ABSOLUTE else error * error
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(mask, term, 0.0)).to(tl.float64))


@triton.jit
def q_sample_loss_bwd_kernel(
    f, x, scale, seed, d_f, n, parts,
    WIDE: tl.constexpr, TARGET: tl.constexpr, ABSOLUTE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, first, places, mask = _part(n, parts, VECTOR, BLOCK)
    error = _error(f, x, seed, first, places, mask, WIDE, TARGET, VECTOR, BLOCK)
    if ABSOLUTE:
        error = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error)).to(WIDE)  # NaN stays
    store(d_f, first, places, error * tl.load(scale + sample), mask, VECTOR)


def _sizes(f: Tensor, *tensors: Tensor) -> tuple[int, int, int, bool]:
    """(programs, elements of a sample, in fours for vectors, parts of a sample, whether vectors)."""
    n = f.numel() // len(f)
    vector = rates.in_fours([n], [f, *tensors])
    parts = triton.cdiv(n, BLOCK)
    return len(f) * parts, n // rates.GROUP if vector else n, parts, vector


def q_sample_out(x: Tensor, signal: Tensor, spread: Tensor, seed: Tensor, out: Tensor) -> None:
    """Writes out. x and out are contiguous, validated by the caller."""
    if not x.numel():
        return
    programs, n, parts, vector = _sizes(x, out)
    with torch.cuda.device_of(x):
        q_sample_kernel[(programs,)](x, signal, spread, seed, out, n, parts, WIDE[x.dtype], vector, BLOCK, **_LAUNCH)


def q_sample_loss_out(f: Tensor, x: Tensor, weight: Tensor, seed: Tensor, absolute: bool, loss: Tensor) -> None:
    """Writes loss []. Of x and seed one is empty; the tensors are laid out alike by the caller, and not empty."""
    targeted = not seed.numel()
    programs, n, parts, vector = _sizes(f, *([x] if targeted else []))
    sums = torch.empty(len(f), parts, dtype=torch.float64, device=f.device)
    with torch.cuda.device_of(f):
        q_sample_loss_kernel[(programs,)](
            f, x if targeted else f, f if targeted else seed, sums, n, parts,
            WIDE[f.dtype], targeted, absolute, vector, BLOCK, **_LAUNCH,
        )  # fmt: skip
    loss.copy_((sums.sum(1) * weight).sum() / f.numel())


def q_sample_loss_bwd_out(f: Tensor, x: Tensor, scale: Tensor, seed: Tensor, absolute: bool, d_f: Tensor) -> None:
    """Writes d_f."""
    if not f.numel():
        return
    targeted = not seed.numel()
    programs, n, parts, vector = _sizes(f, d_f, *([x] if targeted else []))
    with torch.cuda.device_of(f):
        q_sample_loss_bwd_kernel[(programs,)](
            f, x if targeted else f, scale, f if targeted else seed, d_f, n, parts,
            WIDE[f.dtype], targeted, absolute, vector, BLOCK, **_LAUNCH,
        )  # fmt: skip


_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def _cases() -> list[tuple]:
    """What a compilation ahead of time needs: kernel, argument types, compile-time values."""
    cases = []
    for data, wide, wide_pointer in (
        ("*fp32", tl.float32, "*fp32"), ("*bf16", tl.float32, "*fp32"), ("*fp64", tl.float64, "*fp64")
    ):  # fmt: skip
        types = dict.fromkeys(("f", "x", "out", "d_f"), data) | {"n": "i64", "parts": "i32", "sums": "*fp64"}
        types |= dict.fromkeys(("signal", "spread", "scale"), wide_pointer)
        for vector in (False, True):
            values = {"WIDE": wide, "VECTOR": vector, "BLOCK": BLOCK}
            kernels = [(q_sample_kernel, {})]
            for targeted in (False, True):
                options = {"TARGET": targeted, "ABSOLUTE": vector}
                kernels += [(q_sample_loss_kernel, options), (q_sample_loss_bwd_kernel, options)]
            for kernel, more in kernels:
                seed = data if more.get("TARGET") else "*i64"
                names = types | {"seed": seed}
                constants = values | more
                given = {name: names[name] for name in kernel.arg_names if name not in constants}
                cases.append((kernel, given, constants))
    return cases


AOT = _cases()

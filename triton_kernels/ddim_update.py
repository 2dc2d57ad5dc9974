"""An update of a diffusion sampler, one launch:

    out = a x + b clamp(f) + noise n

Reads x and f once and writes out once. n, standard normal noise, is made in registers: Philox, then the inverse of the
distribution in sums, products and bits of fp32 (lic_fast/reference/_noise.py). FP fusion is off: rounds like eager
PyTorch. Takes fp32, bf16, fp16 and fp64; dense tensors laid out alike, row-major where there is noise. The numbers
travel as the bits of fp64, since a float argument would arrive in fp32.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .access import inside
from .rates import noise

BLOCK = 1024
WIDE = {torch.float32: tl.float32, torch.bfloat16: tl.float32, torch.float16: tl.float32, torch.float64: tl.float64}


@triton.jit
def _horner8(x, c0, c1, c2, c3, c4, c5, c6, c7):
    return ((((((c7 * x + c6) * x + c5) * x + c4) * x + c3) * x + c2) * x + c1) * x + c0


@triton.jit
def normal_of(u):
    """The normal number of u, fp32, uniform in (-0.5, 0.5): reference/_noise.py's, operation by operation."""
    x = u * 2.0
    t = 1.0 - tl.abs(x)
    bits = (t * (2.0 - t)).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    part = _horner8(
        f, 1.442694902420044, -0.7213528156280518, 0.48092323541641235, -0.3602396249771118, 0.28709882497787476,
        -0.2488771378993988, 0.23404155671596527, -0.14580978453159332,
    )  # fmt: skip
    v = (exponent.to(tl.float32) + f * part) * (-1 / 11.5) - 1.0
    r = _horner8(
        v, 0.04564310982823372, -0.04216134175658226, -0.0008689965470694005, 0.05037187412381172,
        -0.02765994891524315, -0.012469040229916573, 0.009670699015259743, 0.0,
    )  # fmt: skip
    r = _horner8(
        v, 3.7566518783569336, 1.9913569688796997, -0.45618733763694763, 0.17676332592964172, -0.050427135080099106,
        -0.02488126792013645, 0.05982644483447075, -0.05564600229263306 + r * v,
    )  # fmt: skip
    return x * r


@triton.jit
def _number(bits, WIDE: tl.constexpr):
    return tl.cast(bits.to(tl.int64), tl.float64, bitcast=True).to(WIDE)


@triton.jit
def _update(
    x_ptr, f_ptr, seed_ptr, out_ptr, first, n, numbers, WIDE: tl.constexpr, NOISY: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    a, b, most, amount = numbers
    offsets = first + tl.arange(0, BLOCK)
    mask = inside(offsets, n, 4 if VECTOR else 1)
    value = tl.load(f_ptr + offsets, mask=mask, other=0.0).to(WIDE)
    value = tl.where(value > most, most, value)  # NaN stays
    value = tl.where(value < -most, -most, value)
    total = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(WIDE) * a + value * b
    if NOISY:
        normal = normal_of(tl.reshape(noise(seed_ptr, first, n, tl.float32, 1, BLOCK, True), [BLOCK]))
        total = total + normal.to(WIDE) * amount
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def ddim_update_kernel(
    x_ptr, f_ptr, seed_ptr, out_ptr, n, a_bits: tl.int64, b_bits: tl.int64, clamp_bits: tl.int64, noise_bits: tl.int64,
    WIDE: tl.constexpr, NOISY: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    n = tl.cast(n, tl.int64)
    a = _number(a_bits, WIDE)
    numbers = a, _number(b_bits, WIDE), _number(clamp_bits, WIDE), _number(noise_bits, WIDE)
    if first + BLOCK <= n:
        _update(x_ptr, f_ptr, seed_ptr, out_ptr, first, n, numbers, WIDE, NOISY, VECTOR, BLOCK)
    else:
        _update(x_ptr, f_ptr, seed_ptr, out_ptr, first, n, numbers, WIDE, NOISY, False, BLOCK)


def ddim_update_out(
    x: Tensor, f: Tensor, seed: Tensor, a: float, b: float, clamp: float, noise: float, out: Tensor
) -> None:
    """Writes out. The tensors are laid out alike by the caller; an empty seed is no noise."""
    n = x.numel()
    if not n:
        return
    bits = struct.unpack("<4q", struct.pack("<4d", a, b, clamp, noise))
    vector = all(t.data_ptr() % 16 == 0 for t in (x, f, out))
    noisy = seed.numel() > 0
    with torch.cuda.device_of(x):
        ddim_update_kernel[(triton.cdiv(n, BLOCK),)](
            x, f, seed if noisy else x, out, n, *bits, WIDE[x.dtype], noisy, vector, BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


# What a compilation ahead of time needs: kernel, argument types, compile-time values.
AOT = [
    (
        ddim_update_kernel,
        {
            **dict.fromkeys(("x_ptr", "f_ptr", "out_ptr"), pointer), "seed_ptr": "*i64" if noisy else pointer,
            **dict.fromkeys(("n", "a_bits", "b_bits", "clamp_bits", "noise_bits"), "i64"),
        },
        {"WIDE": wide, "NOISY": noisy, "VECTOR": vector, "BLOCK": BLOCK},
    )
    for pointer, wide in (("*fp32", tl.float32), ("*bf16", tl.float32), ("*fp64", tl.float64))
    for noisy in (False, True)
    for vector in (False, True)
]  # fmt: skip

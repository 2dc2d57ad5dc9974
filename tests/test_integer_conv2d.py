"""lic_fast.functional.integer_conv2d: equal bits in every backend, at every extreme."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import backend_parameters

import lic_fast
from lic_fast.functional import integer_conv2d, integer_conv2d_pack

EVERY_BACKEND = backend_parameters("integer_conv2d")
# batch, channels, outputs, side, height, width
SHAPES = [
    (1, 1, 1, 1, 1, 1), (1, 3, 5, 3, 2, 7), (2, 16, 17, 3, 5, 4), (1, 33, 64, 1, 3, 3), (1, 20, 100, 3, 6, 1),
    (3, 8, 33, 3, 1, 5), (1, 128, 48, 3, 4, 6), (1, 2, 160, 1, 5, 5),
]  # fmt: skip


def inputs(shape, *, most=4095, weights=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch, channels, outputs, side, height, width = shape

    def integers(low, high, size, dtype):
        return torch.randint(low, high + 1, size, generator=g).to(dtype)

    x = integers(-most - 1, most, (batch, channels, height, width), torch.int16)
    weight = integers(-weights, weights, (outputs, channels, side, side), torch.int16)
    bias = integers(-(2**31), 2**31 - 1, (outputs,), torch.int32)
    shift = integers(0, 31, (outputs,), torch.int32)
    return x, weight, bias, shift, integers(-32768, 32767, (batch, outputs, height, width), torch.int16)


def exact(x, weight, bias, shift, residual, leaky, limit):
    """By Python's integers, which never wrap, and one reduction at the end of each sum."""
    x, weight = (t.numpy().astype(object) for t in (x, weight))
    if leaky:
        x = np.where(x > 0, x, (328 * x + (1 << 14)) // (1 << 15))
    outputs, _, side, _ = weight.shape
    batch, _, height, width = x.shape
    padded = np.zeros((*x.shape[:2], height + side - 1, width + side - 1), dtype=object)
    padded[:, :, side // 2 : side // 2 + height, side // 2 : side // 2 + width] = x
    out = np.zeros((batch, outputs, height, width), dtype=object)
    for u in range(side):
        for v in range(side):
            out += np.einsum("oc,bchw->bohw", weight[:, :, u, v], padded[:, :, u : u + height, v : v + width])

    def wrap(value):
        return (value + 2**31) % 2**32 - 2**31

    out = wrap(out + bias.numpy().astype(object)[:, None, None])
    out = out // (2 ** (shift.numpy().astype(object) % 32))[:, None, None]
    if residual is not None:
        out = wrap(out + residual.numpy().astype(object))
    if limit is not None:
        return torch.from_numpy(np.clip(out, -limit, limit).astype(np.int16))
    return torch.from_numpy(out.astype(np.int32))


def check(arguments, device, backend, *, leaky, limit, packed=True, residual=True):
    x, weight, bias, shift, rest = arguments
    rest = rest if residual else None
    wanted = exact(x, weight, bias, shift, rest, leaky, limit)
    x, weight, bias, shift, rest = (None if t is None else t.to(device) for t in (x, weight, bias, shift, rest))
    ready = integer_conv2d_pack(weight) if packed else None
    with lic_fast.use_backend(backend):
        got = integer_conv2d(x, weight, bias, shift, residual=rest, leaky=leaky, limit=limit, packed=ready)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert got.is_contiguous(memory_format=torch.contiguous_format if limit is None else torch.channels_last)
    assert torch.equal(got.cpu(), wanted)


@EVERY_BACKEND
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("leaky", [False, True], ids=["plain", "leaky"])
@pytest.mark.parametrize("limit", [None, 1, 4095, 32767])
def test_equals_pythons_integers(device, backend, shape, leaky, limit):
    check(inputs(shape), device, backend, leaky=leaky, limit=limit, residual=limit != 1)


@EVERY_BACKEND
@pytest.mark.parametrize(("value", "weight"), [(-32768, -32768), (32767, -32768), (32767, 32767), (-1, 1), (-129, 127)])
@pytest.mark.parametrize("leaky", [False, True], ids=["plain", "leaky"])
def test_extremes_wrap_alike(device, backend, value, weight, leaky):
    x, w, bias, shift, rest = inputs((1, 70, 18, 3, 3, 4))
    for limit in (None, 4095):
        check((x.fill_(value), w.fill_(weight), bias, shift, rest), device, backend, leaky=leaky, limit=limit)


@EVERY_BACKEND
def test_any_int16_and_any_shift(device, backend):
    x, weight, bias, shift, rest = inputs((1, 37, 40, 3, 3, 5), most=32767, weights=32767, seed=3)
    check((x, weight, bias, shift, rest), device, backend, leaky=True, limit=None, packed=False)
    check((x, weight, bias, shift - 64, rest), device, backend, leaky=False, limit=None)


@EVERY_BACKEND
def test_every_value_through_the_leaky_relu(device, backend):
    x = torch.arange(-32768, 32768).to(torch.int16).view(1, 1, 256, 256)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.int16), torch.zeros(1, dtype=torch.int32)
    with lic_fast.use_backend(backend):
        got = integer_conv2d(x.to(device), one.to(device), zero.to(device), zero.to(device), leaky=True)
    got = got.cpu().flatten().long()
    x = x.flatten().long()
    assert torch.equal(got[x >= 0], x[x >= 0])
    assert torch.equal(got[x < 0], ((x * 328).double() / 32768 + 0.5).floor().long()[x < 0])


@EVERY_BACKEND
def test_layouts_and_views(device, backend):
    x, weight, bias, shift, rest = (t.to(device) for t in inputs((2, 10, 12, 3, 6, 8)))
    with lic_fast.use_backend(backend):
        wanted = integer_conv2d(x, weight, bias, shift, residual=rest, limit=4095)
        wide = torch.cat([x, x], 1)
        for form in (
            x.contiguous(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
            wide[:, :10],
            wide.repeat_interleave(2, 3)[:, :10, :, ::2],
        ):
            for other in (rest, rest.contiguous(memory_format=torch.channels_last), rest.clone().transpose(0, 0)):
                got = integer_conv2d(form, weight, bias, shift, residual=other, limit=4095)
                assert torch.equal(got, wanted)


@EVERY_BACKEND
@pytest.mark.parametrize("size", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
def test_empty_images(device, backend, size):
    x = torch.zeros(size, dtype=torch.int16, device=device)
    _, weight, bias, shift, _ = (t.to(device) for t in inputs((1, 4, 7, 3, 1, 1)))
    with lic_fast.use_backend(backend):
        for limit in (None, 9):
            assert integer_conv2d(x, weight, bias, shift, limit=limit).shape == (size[0], 7, *size[2:])


@EVERY_BACKEND
def test_opcheck_and_compile(device, backend):
    x, weight, bias, shift, rest = (t.to(device) for t in inputs((1, 5, 6, 3, 4, 4)))
    with lic_fast.use_backend(backend):
        for limit in (0, 4095):
            torch.library.opcheck(torch.ops.lic_fast.integer_conv2d, (x, weight, bias, shift, rest, None, True, limit))
        compiled = torch.compile(
            lambda x: integer_conv2d(x, weight, bias, shift, limit=99) + 1, fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(x), integer_conv2d(x, weight, bias, shift, limit=99) + 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    if lic_fast.explain("integer_conv2d", "cpu").reasons["cpp"]:
        pytest.skip("no native library")
    arguments = inputs((1, 128, 128, 3, 24, 24))  # three times what stays on one thread
    with lic_fast.use_backend("reference"):
        wanted = integer_conv2d(*arguments[:4], leaky=True, limit=4095)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with lic_fast.use_backend("cpp"):
            assert torch.equal(integer_conv2d(*arguments[:4], leaky=True, limit=4095), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("simd", ["generic", "avx2", "avx512"])
def test_instruction_sets_agree(simd):
    """In processes of their own: the choice is made at load."""
    if lic_fast.explain("integer_conv2d", "cpu").reasons["cpp"]:
        pytest.skip("no native library")
    selected = f"{__file__}::test_extremes_wrap_alike", f"{__file__}::test_any_int16_and_any_shift"
    shapes = f"{__file__}::test_equals_pythons_integers"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpp", *selected, shapes],
        env={**os.environ, "LIC_FAST_SIMD": simd}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_wrong_arguments_are_named():
    x, weight, bias, shift, rest = inputs((1, 4, 6, 3, 5, 5))
    wrong = [
        (ValueError, r"x must be \[B, 4, H, W\]", (x[:, :3], weight, bias, shift), {}),
        (ValueError, r"weight must be \[O, C, k, k\]", (x, weight[:, :, :2, :2], bias, shift), {}),
        (ValueError, r"bias and shift must be \[6\]", (x, weight, bias[:5], shift), {}),
        (ValueError, "residual must be", (x, weight, bias, shift), {"residual": rest[:, :5]}),
        (ValueError, "packed must be", (x, weight, bias, shift), {"packed": weight}),
        (ValueError, "limit must be 1 to 32767", (x, weight, bias, shift), {"limit": 32768}),
        (ValueError, "limit must be 1 to 32767", (x, weight, bias, shift), {"limit": 0}),
        (TypeError, "x must be one of int16", (x.int(), weight, bias, shift), {}),
        (TypeError, "shift must be one of int32", (x, weight, bias, shift.to(torch.uint8)), {}),
        (TypeError, "bias must be a tensor", (x, weight, None, shift), {}),
        (TypeError, "weight must be on the device of x", (x, weight.to("meta"), bias, shift), {}),
    ]
    for error, said, arguments, options in wrong:
        with pytest.raises(error, match=said) as caught:
            integer_conv2d(*arguments, **options)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("integer_conv2d: ")
    with pytest.raises(TypeError, match="weight must be one of int16"):
        integer_conv2d_pack(weight.int())
    with pytest.raises(ValueError, match="at most 4194304 products"):
        integer_conv2d_pack(torch.zeros(1, 466034, 3, 3, dtype=torch.int16))

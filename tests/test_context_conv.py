"""lic_fast.functional.context_conv in every backend at hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_by_rule, backend_parameters

import lic_fast
from lic_fast.functional import context_conv, context_conv_pack

EVERY_BACKEND = backend_parameters("context_conv")
SHAPES = [(1, 1, 3), (24, 12, 5), (65, 17, 5), (64, 16, 3), (384, 192, 5), (40, 33, 7)]  # outputs, channels, side


def inputs(outputs, channels, side, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, channels, side, side, generator=g)
    y_hat = torch.randn(1, channels, side + 3, side + 4, generator=g)
    return y_hat[:, :, 2 : 2 + side, 1 : 1 + side], weight, torch.randn(outputs, generator=g)


def masked(weight):
    side = weight.shape[-1]
    return weight * (torch.arange(side * side) < side * side // 2).view(side, side)


@EVERY_BACKEND
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_matches_fp64(device, backend, shape, with_bias):
    if device != "cpu":
        pytest.skip("runs on the CPU")
    crop, weight, bias = inputs(*shape)
    bias = bias if with_bias else None
    with lic_fast.use_backend(backend):
        ours = context_conv(crop, weight, context_conv_pack(weight), bias=bias)
    same = F.conv2d(crop, masked(weight), bias)
    exact = F.conv2d(crop.double(), masked(weight).double(), None if bias is None else bias.double())
    assert_by_rule(ours, same, exact)


@EVERY_BACKEND
def test_what_is_not_decoded_yet_is_not_read(device, backend):
    if device != "cpu":
        pytest.skip("runs on the CPU")
    crop, weight, bias = inputs(24, 12, 5)
    packed = context_conv_pack(weight)
    with lic_fast.use_backend(backend):
        before = context_conv(crop, weight, packed, bias=bias)
        crop.flatten(2)
        dirty = crop.clone()
        dirty[:, :, 2, 2:] = dirty[:, :, 3:] = torch.nan
        assert torch.equal(context_conv(dirty, weight, packed, bias=bias), before)
        dirty[:, :, 2, 1] = torch.nan
        assert context_conv(dirty, weight, packed, bias=bias).isnan().all()


@EVERY_BACKEND
def test_opcheck_and_compile(device, backend):
    if device != "cpu":
        pytest.skip("runs on the CPU")
    crop, weight, bias = inputs(24, 12, 5)
    packed = context_conv_pack(weight)
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.context_conv, (crop, weight, bias, packed))
        expected = context_conv(crop, weight, packed, bias=bias)
        whole = torch.compile(lambda: context_conv(crop, weight, packed, bias=bias) * 2, fullgraph=True,
                              backend="aot_eager")  # fmt: skip
        assert torch.equal(whole(), expected * 2)


def test_the_order_of_sums_is_what_is_documented():
    if "cpp" not in {b for _, b in EVERY_BACKEND.args[1]} or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("the native kernel's fused chains need AVX-512 here")
    crop, weight, bias = inputs(3, 40, 5)
    ours = context_conv(crop, weight, context_conv_pack(weight), bias=bias).flatten()
    for o in range(3):
        total = bias[o]
        for block in range(0, 40, 16):
            chain = torch.zeros(())
            for tap in range(12):
                for c in range(block, min(block + 16, 40)):
                    # one rounding: the product of two fp32 is exact in fp64, the sum nearly always
                    product = crop[0, c, tap // 5, tap % 5].double() * weight[o, c, tap // 5, tap % 5].double()
                    chain = (product + chain.double()).float()
            total = chain + total
        assert ours[o] == total


def test_bad_input_is_named():
    crop, weight, bias = inputs(24, 12, 5)
    packed = context_conv_pack(weight)
    for call, error, message in (
        (lambda: context_conv_pack(weight.double()), TypeError, "weight must be one of float32"),
        (lambda: context_conv_pack(weight[:, :, :, :4]), ValueError, "k odd"),
        (lambda: context_conv_pack(weight[:, :, :1, :1]), ValueError, "at least 3"),
        (lambda: context_conv_pack(weight[:0]), ValueError, "channels and outputs"),
        (lambda: context_conv(crop[:, :5], weight, packed), ValueError, "crop must be"),
        (lambda: context_conv(crop, weight, packed[:, :, :3]), ValueError, "pack the weight again"),
        (lambda: context_conv(crop, weight, packed, bias=bias[:3]), ValueError, "bias must be"),
        (lambda: context_conv(crop.to("meta"), weight, packed), TypeError, "must be on the CPU"),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

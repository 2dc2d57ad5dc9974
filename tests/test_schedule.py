"""functional.schedule_quantize_, schedule_dequantize_ and schedule_levels in every backend at hand."""

from __future__ import annotations

import pytest
import torch
from conftest import backend_parameters

import lic_fast
from lic_fast.coding import scale_indexes
from lic_fast.functional import schedule_dequantize_, schedule_levels, schedule_quantize_
from lic_fast.reference import schedule as reference

QUANTIZE = backend_parameters("schedule_quantize_")
DEQUANTIZE = backend_parameters("schedule_dequantize_")
LEVELS = backend_parameters("schedule_levels")
NAN, INF = float("nan"), float("inf")
ODD = [NAN, INF, -INF, 0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 8388607.5, 1e10, -1e10, 3e38, 0.109375, 0.11328125, 3968.0]
# (B, C, H, W), first, channels, row, column, stride
STEPS = [
    ((1, 5, 9, 7), 0, 5, 0, 0, 1),
    ((2, 6, 9, 7), 2, 3, 1, 1, 2),
    ((1, 6, 16, 23), 0, 6, 0, 4, 8),
    ((3, 4, 33, 40), 1, 2, 2, 0, 4),
    ((2, 4, 3, 3), 0, 4, 2, 2, 4),
    ((1, 4, 3, 3), 0, 4, 4, 4, 8),  # no elements
    ((0, 4, 8, 8), 0, 4, 0, 0, 2),
    ((1, 32, 64, 96), 16, 16, 1, 0, 2),
]


def step(case, device="cpu", odd=True):
    """(y_hat, y, parameters, place)"""
    shape, first, channels, row, column, stride = case
    g = torch.Generator().manual_seed(sum(shape) + row + 3 * column)
    part = reference.of_step(torch.empty(shape), channels, first, row, column, stride).shape
    y, y_hat = 30 * torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    scales = torch.exp(9 * torch.rand(part, generator=g) - 3)
    parameters = torch.cat([scales, 20 * torch.randn(part, generator=g)], 1)
    if odd and y.numel() and parameters.numel():
        for flat in (y.view(-1), parameters.view(-1), parameters.view(-1).flip(0)):
            places = torch.randint(flat.numel(), (flat.numel() // 9 + 1,), generator=g)
            flat[places] = torch.tensor(ODD)[torch.randint(len(ODD), places.shape, generator=g)]
    place = {"first": first, "row": row, "column": column, "stride": stride}
    return y_hat.to(device), y.to(device), parameters.to(device), place


def same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@QUANTIZE
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_quantize_is_the_reference_to_the_bit(device, backend, case):
    y_hat, y, parameters, place = step(case, device)
    expected_hat = y_hat.clone()
    expected = reference.schedule_quantize_(expected_hat, y, parameters, *place.values())
    with lic_fast.use_backend(backend):
        found = schedule_quantize_(y_hat, y, parameters, **place)
    for ours, theirs in zip((*found, y_hat), (*expected, expected_hat), strict=True):
        assert ours.dtype == theirs.dtype
        same(ours, theirs)


@QUANTIZE
def test_quantize_against_double_precision(device, backend):
    y_hat, y, parameters, place = step(STEPS[-1], device, odd=False)
    before = y_hat.clone()
    with lic_fast.use_backend(backend):
        symbols, levels, values = schedule_quantize_(y_hat, y, parameters, **place)
    means = parameters[:, 16:].double()
    elements = y[:, 16:, 1::2, ::2].double()
    exact = (elements - means).round()
    near_tie = ((elements - means) - exact).abs() > 0.4999
    assert ((symbols.double() == exact) | near_tie).all() and near_tie.double().mean() < 1e-3
    assert (values.double() - symbols - means).abs().max() < 1e-5
    assert (elements - values.double()).abs().max() < 0.5 + 1e-5
    same(levels.int(), scale_indexes(parameters[:, :16]))
    same(y_hat[:, 16:, 1::2, ::2], values)
    y_hat[:, 16:, 1::2, ::2] = before[:, 16:, 1::2, ::2]
    same(y_hat, before)  # no other place is touched


@DEQUANTIZE
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_dequantize_gives_back_what_quantize_left(device, backend, case):
    y_hat, y, parameters, place = step(case, device)
    symbols, _, values = reference.schedule_quantize_(y_hat, y, parameters, *place.values())
    mine = torch.where(torch.arange(y_hat.numel(), device=device).view(y_hat.shape) >= 0, y_hat, y_hat)
    reference.of_step(mine, values.shape[1], *place.values()).fill_(7.0)
    with lic_fast.use_backend(backend):
        found = schedule_dequantize_(mine, symbols, parameters, **place)
    same(found, values)
    same(mine, y_hat)


@LEVELS
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_levels(device, backend, case):
    parameters = step(case, device)[2]
    with lic_fast.use_backend(backend):
        found = schedule_levels(parameters)
    c = parameters.shape[1] // 2
    assert found.dtype is torch.uint8
    same(found.int(), scale_indexes(parameters[:, :c]))


@QUANTIZE
def test_threads_and_strided_arguments(device, backend):
    y_hat, y, parameters, place = step(((2, 8, 128, 200), 0, 8, 1, 0, 2), device)
    expected = [y_hat.clone()]
    expected += reference.schedule_quantize_(expected[0], y, parameters, *place.values())
    strided_y = torch.stack([y, y], -1)[..., 0]
    strided_parameters = torch.nn.functional.pad(parameters, (0, 3, 0, 1))[:, :, :-1, :-3]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            mine = y_hat.clone()
            with lic_fast.use_backend(backend):
                found = schedule_quantize_(mine, strided_y, strided_parameters, **place)
            for ours, theirs in zip((mine, *found), expected, strict=True):
                same(ours, theirs)
    finally:
        torch.set_num_threads(threads)


def test_what_is_refused():
    y_hat, y, parameters, place = step(STEPS[1])
    symbols = torch.zeros(2, 3, 4, 3, dtype=torch.int32)
    before = y_hat.clone()
    with pytest.raises(TypeError, match="y must be one of float32"):
        schedule_quantize_(y_hat, y.double(), parameters, **place)
    with pytest.raises(TypeError, match="symbols must be one of int32"):
        schedule_dequantize_(y_hat, symbols.long(), parameters, **place)
    with pytest.raises(ValueError, match=r"parameters must be \[B, 2 c, h, w\]"):
        schedule_levels(parameters[:, :3])
    with pytest.raises(ValueError, match="row, column < stride"):
        schedule_quantize_(y_hat, y, parameters, **(place | {"row": 2}))
    with pytest.raises(ValueError, match="the step has"):
        schedule_quantize_(y_hat, y, parameters[:, :, 1:], **place)
    with pytest.raises(ValueError, match="the step has"):
        schedule_quantize_(y_hat, y, parameters, **(place | {"first": 4}))
    with pytest.raises(ValueError, match="symbols must be"):
        schedule_dequantize_(y_hat, symbols[:, :2], parameters, **place)
    with pytest.raises(ValueError, match="contiguous"):
        schedule_quantize_(y_hat.transpose(2, 3), y.transpose(2, 3), parameters, **place)
    with pytest.raises(ValueError, match="share memory"):
        schedule_quantize_(y_hat, y_hat, parameters, **place)
    with pytest.raises(RuntimeError, match="requires grad"):
        schedule_quantize_(y_hat.clone().requires_grad_(), y, parameters, **place)
    same(y_hat, before)


def test_the_ops_are_registered_rightly():
    y_hat, y, parameters, place = step(STEPS[1], odd=False)
    symbols = torch.ones(2, 3, 4, 3, dtype=torch.int32)
    ops, checks = torch.ops.lic_fast, ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in (
        (ops.schedule_quantize_, (y_hat, y, parameters, *place.values())),
        (ops.schedule_dequantize_, (y_hat, symbols, parameters, *place.values())),
        (ops.schedule_levels, (parameters,)),
    ):
        torch.library.opcheck(op, args, test_utils=checks)

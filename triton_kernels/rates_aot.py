"""What a compilation ahead of time needs of the rate kernels: kernel, argument types, compile-time values, options.

A choice: each family alone, three Gaussians by logits, a mixture of all three families, five components in a loop,
sums for each channel; a launch compiles what it meets.
"""

from __future__ import annotations

import triton.language as tl

from . import factorized_rate, mixture_rate, rates

_ARITHMETIC = {"fp32": tl.float32, "bf16": tl.float32, "fp64": tl.float64}
_SIZES = ("step", "step_y", "step_scales", "step_means", "step_weights", "rows", "length", "inner", "families")
_BITS = ("scale_bits", "limit_bits", "bound_bits")
_FORWARD = {
    "K": 1, "FAMILIES": 0, "HAS_MEANS": True, "MIXED": 0, "QUANTIZE": 1, "OUTPUT": 0, "VECTOR": True,
    "ROWS": 1, "COLS": 1024,
}  # fmt: skip
_BACKWARD = _FORWARD | {"GRAD_Y_HAT": 1, "GRAD_RATE": 1, "NEED": 7, "BOUNDED": False}
_THREE = {"COLS": 512, "K": 3, "FAMILIES": 0, "MIXED": 2, "NEED": 15}
_MIXED = {"COLS": 512, "K": 3, "FAMILIES": 0b100100, "MIXED": 1, "NEED": 15, "QUANTIZE": 2}
_LOOP = {"COLS": 512, "K": 0, "FAMILIES": 0, "MIXED": 2, "NEED": 15, "QUANTIZE": 0, "VECTOR": False}
_SUMS = {"OUTPUT": 2, "ROWS": 2, "COLS": 512, "QUANTIZE": 3}
_FACTORIZED = {"CENTRED": False, "QUANTIZE": 1, "OUTPUT": 0, "ROWS": 8, "COLS": factorized_rate.BLOCK // 8}
_FACTORIZED_BACKWARD = _FACTORIZED | {"GRAD_Y_HAT": 1, "GRAD_RATE": 1, "NEED": 3, "BOUNDED": True}


def _case(kernel, data: str, parameters: str, values: dict, options: dict) -> tuple:
    """parameters: the type of the factorized density's; in a mixture they are of y's."""
    wide = "fp64" if data == "fp64" else "fp32"
    values = {name: value for name, value in values.items() if name in kernel.arg_names}
    values["WIDE"] = _ARITHMETIC[data]
    types = {name: f"*{parameters if 'weights' in name or 'medians' in name else data}" for name in kernel.arg_names}
    types |= {"seed": "*i64", "rate": f"*{wide}", "grad_rate": f"*{wide}"}
    types |= dict.fromkeys(_SIZES + _BITS, "i64") | dict.fromkeys(
        ("tiles", "count", "splits", "batches", "channels"), "i32"
    )
    return kernel, {name: types[name] for name in kernel.arg_names if name not in values}, values, options


def _cases() -> list[tuple]:
    forward, backward = mixture_rate.mixture_rate_fwd_kernel, mixture_rate.mixture_rate_bwd_kernel
    changes = [("fp32", {"FAMILIES": family}) for family in range(3)]
    changes += [
        ("bf16", {}),
        ("fp64", {"QUANTIZE": 2, "COLS": 512}),
        ("fp32", _THREE),
        ("bf16", _MIXED),
        ("fp32", _LOOP),
    ]
    cases = []
    for data, change in changes:
        cases.append(_case(forward, data, data, _FORWARD | change, rates.LAUNCH))
        cases.append(_case(backward, data, data, _BACKWARD | change, rates.LAUNCH))
    cases.append(_case(forward, "fp32", "fp32", _FORWARD | _SUMS, rates.LAUNCH))
    for kernel, values in (
        (factorized_rate.factorized_rate_fwd_kernel, _FACTORIZED),
        (factorized_rate.factorized_rate_bwd_kernel, _FACTORIZED_BACKWARD),
    ):
        cases.append(_case(kernel, "bf16", "fp32", values, factorized_rate.LAUNCH))
    return cases


AOT = _cases()

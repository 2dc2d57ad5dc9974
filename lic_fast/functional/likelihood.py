"""Rates of quantised latents under the densities of learned image compression, and their gradients, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..ops._library import FLOATS
from ..ops._rates import BITS, BITS_PER_CHANNEL, DEQUANTIZE, LIKELIHOOD, NOISE, NONE, STE
from ..ops.mixture_rate import FAMILIES
from . import _check

QUANTIZE = {"none": NONE, "noise": NOISE, "ste": STE, "dequantize": DEQUANTIZE}
OUTPUTS = {"bits": BITS, "likelihood": LIKELIHOOD, "bits_per_channel": BITS_PER_CHANNEL}
COMPRESSAI_BOUND = 1e-9
_PARAMETERS_PER_CHANNEL = "matrix, bias and factor of each layer, the last layer without factor"


def gaussian_rate(
    y: Tensor,
    scales: Tensor,
    means: Tensor | None = None,
    *,
    quantize: str = "none",
    seed: int | Tensor | None = None,
    scale_bound: float = 0.11,
    bound: str | float = "none",
    output: str = "bits",
) -> tuple[Tensor, Tensor]:
    """(y_hat, rate) of y under a normal density of deviation `scales` about `means`, convolved with a unit box.

    y, scales, means [*] of one dtype, fp32, bf16, fp16 or fp64, and one shape (nothing is broadcast); means None is 0.
    The arithmetic is fp32 (fp64 for fp64), in the log domain: finite, right values and gradients at any distance.

    quantize: "none": y is taken as it is, y_hat is y itself. "noise": y + u, u uniform in (-0.5, 0.5), element i in
    row-major order from word i % 4 of Philox4x32-10 with key `seed` and counter i // 4, so that a seed gives one noise
    on every backend and device; the noise is never stored. "ste" and "dequantize":
    round(y - means) + means, halves to even; "ste" has the derivative 1 in y, "dequantize" 0, as in CompressAI, where
    y_hat follows the means. seed: an int or a tensor [1] int64 on y's device; None draws one from torch's generator of
    that device.

    scale_bound: smaller scales become it; their gradient passes only where it would raise the scale, which is
    CompressAI's rule. 0: none; a scale that is not positive then gives NaN.
    bound: "none": exact. "compressai": likelihoods are at least 1e-9, and below that the gradient passes, multiplied
    by the tiny likelihood, only where it would raise it, as CompressAI's LowerBound has it; a float: that bound.

    output: "bits" [*], "likelihood" [*], or "bits_per_channel" [B, C]: bits summed over all dimensions but the first
    two. fp32, or fp64 for fp64. Likelihoods with bound "none" are at least the dtype's smallest normal number, and
    their gradient is that of the log-likelihood times the result, so that -log2(likelihood) has right gradients also
    where the value is floored. y_hat has y's dtype; the rate is that of the value before it is rounded to it.

    There are neither gradients of gradients nor forward-mode derivatives, nor those of torch.func (RuntimeError). NaN
    gives NaN.
    Raises ValueError for shapes and settings, TypeError for dtypes and devices, BackendError for a forced backend.
    Source: Balle et al., ICLR 2018 (arXiv 1802.01436), the model; CompressAI's GaussianConditional, the bounds.
    """
    return _single("gaussian", y, scales, means, quantize, seed, scale_bound, bound, output)


def logistic_rate(
    y: Tensor,
    scales: Tensor,
    means: Tensor | None = None,
    *,
    quantize: str = "none",
    seed: int | Tensor | None = None,
    scale_bound: float = 0.11,
    bound: str | float = "none",
    output: str = "bits",
) -> tuple[Tensor, Tensor]:
    """gaussian_rate with a logistic density: cumulative sigmoid((y - means) / scales).

    Raises what gaussian_rate raises. Source: Salimans et al., ICLR 2017 (PixelCNN++), the density; the form without
    the difference of near numbers, sigmoid(-a) sigmoid(b) (1 - exp(a - b)), is our choice.
    """
    return _single("logistic", y, scales, means, quantize, seed, scale_bound, bound, output)


def laplace_rate(
    y: Tensor,
    scales: Tensor,
    means: Tensor | None = None,
    *,
    quantize: str = "none",
    seed: int | Tensor | None = None,
    scale_bound: float = 0.11,
    bound: str | float = "none",
    output: str = "bits",
) -> tuple[Tensor, Tensor]:
    """gaussian_rate with a Laplace density: exp(-|y - means| / scales) / (2 scales).

    Raises what gaussian_rate raises. Source: Zhou et al., CVPR workshops 2018, among others, use it for latents.
    """
    return _single("laplace", y, scales, means, quantize, seed, scale_bound, bound, output)


def mixture_rate(
    y: Tensor,
    scales: Tensor,
    means: Tensor,
    weights: Tensor,
    *,
    families: str | Sequence[str] = "gaussian",
    logits: bool = False,
    quantize: str = "none",
    seed: int | Tensor | None = None,
    scale_bound: float = 0.11,
    bound: str | float = "none",
    output: str = "bits",
) -> tuple[Tensor, Tensor]:
    """(y_hat, rate) of y under a mixture of K densities, each convolved with a unit box.

    y [B, C, *]; scales, means, weights [B, K * C, *] of y's dtype, component after component as in CompressAI: the
    first C channels are the first component's. families: "gaussian", "logistic" or "laplace" for all components, or
    one name for each. weights: probabilities (not normalised here; negative: NaN), or with logits=True their logits,
    normalised by softmax over the components. K is at most 16. "ste" and "dequantize" round y about 0.
    The rest is as in gaussian_rate. Raises what gaussian_rate raises.

    Source: Cheng et al., CVPR 2020, the Gaussian mixture; Fu et al., 2021 (arXiv 2107.06463), the three families mixed.
    """
    f = "mixture_rate"
    for name, value in (("y", y), ("scales", scales), ("means", means), ("weights", weights)):
        _check.tensor(f, name, value)
    if y.dim() < 2:
        raise ValueError(f"{f}: y must have at least 2 dimensions [B, C, *], got shape {list(y.shape)}")
    k = _components(f, y, scales)
    names = [families] * k if isinstance(families, str) else list(families)
    if len(names) != k:
        raise ValueError(f"{f}: families must name each of the {k} components of scales, got {len(names)}")
    codes = [_one_of(f, "families", name, FAMILIES) for name in names]
    for name, value in (("means", means), ("weights", weights)):
        _check.same_shape(f, ("scales", scales), (name, value))
    parameters = (("scales", scales), ("means", means), ("weights", weights))
    settings = _settings(f, y, quantize, seed, scale_bound, bound, output, parameters)
    return _run(f, y, scales, means, weights, codes, bool(logits), settings)


def factorized_rate(
    y: Tensor,
    weights: Tensor,
    medians: Tensor | None = None,
    *,
    filters: Sequence[int] = (3, 3, 3, 3),
    quantize: str = "none",
    seed: int | Tensor | None = None,
    bound: str | float = "none",
    output: str = "bits",
) -> tuple[Tensor, Tensor]:
    """(y_hat, rate) of y under CompressAI's EntropyBottleneck: a learned density for each channel.

    y [B, C, *] fp32, bf16, fp16 or fp64; weights [C, P] fp32 (fp64 for fp64) as pack_factorized makes them: for each
    layer the matrix, the bias and the factor, before softplus and tanh; medians [C] of weights' dtype, about which
    "ste" and "dequantize" round; filters: the widths of the hidden layers. The kernels take (3, 3, 3, 3), CompressAI's
    default; for others the reference runs. Gradients flow to y, weights and, with "dequantize", medians.
    The rest is as in gaussian_rate.

    Raises ValueError for shapes and settings, TypeError for dtypes and devices, BackendError for a forced backend.
    Source: Balle et al., ICLR 2018 (arXiv 1802.01436), appendix 6.1; CompressAI's parametrisation.
    """
    f = "factorized_rate"
    _check.tensor(f, "y", y), _check.tensor(f, "weights", weights)
    if y.dim() < 2:
        raise ValueError(f"{f}: y must have at least 2 dimensions [B, C, *], got shape {list(y.shape)}")
    filters = [int(width) for width in filters]
    widths = [1, *filters, 1]
    size = sum(b * a + 2 * b for a, b in pairwise(widths)) - 1
    if min(widths) < 1 or weights.shape != (y.shape[1], size):
        raise ValueError(
            f"{f}: weights must be [C, {size}] ({_PARAMETERS_PER_CHANNEL}) with C = {y.shape[1]} and filters "
            f"{tuple(filters)}, got {list(weights.shape)}; make them with pack_factorized"
        )
    _check.dtype_in(f, "y", y, FLOATS)
    _check.dtype_in(f, "weights", weights, (torch.promote_types(y.dtype, torch.float32),))
    if medians is not None:
        _check.tensor(f, "medians", medians)
        if medians.shape != (y.shape[1],):
            raise ValueError(f"{f}: medians must be [C] with C = {y.shape[1]}, got {list(medians.shape)}")
        _check.dtype_in(f, "medians", medians, (weights.dtype,))
    mode, seed, bound, output = _common(f, y, quantize, seed, bound, output)
    _check.same_device(f, ("y", y), ("weights", weights), ("medians", medians), ("seed", seed))
    y_hat, rate = torch.ops.lic_fast.factorized_rate(y, weights, medians, seed, filters, mode, bound, output)
    return (y if mode == NONE else y_hat), rate


def pack_factorized(matrices: Sequence[Tensor], biases: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """The parameters of CompressAI's EntropyBottleneck as factorized_rate takes them, [C, P]; differentiable.

    matrices: L + 1 tensors [C, out, in]; biases: L + 1 [C, out, 1]; factors: L [C, out, 1].
    Raises ValueError where the lists do not fit each other. Source: our choice.
    """
    if not len(matrices) == len(biases) == len(factors) + 1:
        raise ValueError(
            f"pack_factorized: needs as many matrices as biases and one factor less, got {len(matrices)}, "
            f"{len(biases)} and {len(factors)}"
        )
    rows = []
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        rows += [matrix.flatten(1), bias.flatten(1)] + ([factors[i].flatten(1)] if i < len(factors) else [])
    return torch.cat(rows, 1)


def _single(
    family: str, y: Tensor, scales: Tensor, means: Tensor | None, quantize: str, seed: int | Tensor | None,
    scale_bound: float, bound: str | float, output: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    f = f"{family}_rate"
    for name, value in (("y", y), ("scales", scales), *([("means", means)] if means is not None else [])):
        _check.tensor(f, name, value)
    _check.same_shape(f, ("y", y), ("scales", scales), ("means", means))
    settings = _settings(f, y, quantize, seed, scale_bound, bound, output, (("scales", scales), ("means", means)))
    if y.dim() >= 2:
        return _run(f, y, scales, means, None, [FAMILIES[family]], False, settings)
    if output == "bits_per_channel":
        raise ValueError(f"{f}: bits_per_channel needs y [B, C, *], got shape {list(y.shape)}; use output='bits'")
    flat = [None if t is None else t.reshape(1, -1) for t in (y, scales, means)]
    y_hat, rate = _run(f, *flat, None, [FAMILIES[family]], False, settings)
    return (y if quantize == "none" else y_hat.reshape(y.shape)), rate.reshape(y.shape)


def _components(f: str, y: Tensor, scales: Tensor) -> int:
    fits = scales.dim() == y.dim() and scales.shape[:1] == y.shape[:1] and scales.shape[2:] == y.shape[2:]
    k = scales.shape[1] // max(y.shape[1], 1) if fits else 0
    if not fits or not 1 <= k <= 16 or scales.shape[1] != k * y.shape[1]:
        raise ValueError(
            f"{f}: scales must be [B, K * C, *] for y [B, C, *] with K from 1 to 16, got {list(scales.shape)} and "
            f"{list(y.shape)}"
        )
    return k


def _one_of(f: str, name: str, value: object, allowed: dict[str, int]) -> int:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{f}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return allowed[value]


def _common(
    f: str, y: Tensor, quantize: str, seed: int | Tensor | None, bound: str | float, output: str
) -> tuple[int, Tensor | None, float, int]:
    """The settings that all rates share, as the ops take them."""
    mode, form = _one_of(f, "quantize", quantize, QUANTIZE), _one_of(f, "output", output, OUTPUTS)
    if bound == "none":
        bound = 0.0
    elif bound == "compressai":
        bound = COMPRESSAI_BOUND
    elif not (isinstance(bound, (int, float)) and 0 <= bound < 1):
        raise ValueError(f"{f}: bound must be 'none', 'compressai' or a number in [0, 1), got {bound!r}")
    _check.no_forward_mode(f)
    return mode, _seed(f, y, seed) if mode == NOISE else None, float(bound), form


def _seed(f: str, y: Tensor, seed: int | Tensor | None) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            raise ValueError(f"{f}: seed must be an int or a tensor [1] int64, got {seed.dtype} {list(seed.shape)}")
        return seed.reshape(1)
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=y.device)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"{f}: seed must be an int of 64 bits or a tensor [1] int64, got {seed!r}")
    return torch.full((1,), seed, dtype=torch.int64, device=y.device)


def _settings(
    f: str, y: Tensor, quantize: str, seed: int | Tensor | None, scale_bound: float, bound: str | float, output: str,
    parameters: Sequence[tuple[str, Tensor | None]],
) -> tuple[int, Tensor | None, float, float, int]:  # fmt: skip
    _check.dtype_in(f, "y", y, FLOATS)
    for name, value in parameters:
        if value is not None:
            _check.dtype_in(f, name, value, (y.dtype,))
    if not (isinstance(scale_bound, (int, float)) and math.isfinite(scale_bound) and scale_bound >= 0):
        raise ValueError(f"{f}: scale_bound must be a finite number, 0 or more, got {scale_bound!r}")
    mode, seed, bound, form = _common(f, y, quantize, seed, bound, output)
    _check.same_device(f, ("y", y), *parameters, ("seed", seed))
    return mode, seed, float(scale_bound), bound, form


def _run(
    f: str, y: Tensor, scales: Tensor, means: Tensor | None, weights: Tensor | None, codes: list[int], logits: bool,
    settings: tuple[int, Tensor | None, float, float, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mode, seed, scale_bound, bound, output = settings
    slopes = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, scales, means, weights))
    y_hat, rate, _ = torch.ops.lic_fast.mixture_rate(
        y, scales, means, weights, seed, codes, mode, scale_bound, bound, logits, output, slopes
    )
    return (y if mode == NONE else y_hat), rate

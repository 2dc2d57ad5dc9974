"""CompressAI's GaussianMixtureConditional on the fused likelihood."""

from __future__ import annotations

from collections.abc import Iterator

import compressai.entropy_models
import torch
from torch import Tensor

from ..coding import mixture_parameters, mixture_tables
from ..functional import mixture_rate
from ._bitstream import decode_samples, encode_samples, is_own
from ._coder import decode_rows, encode_intervals
from ._model import common_dtype
from .gaussian_conditional import ScaleTables

__all__ = ["GaussianMixtureConditional"]

_MOST_COMPONENTS = 16  # of functional.mixture_rate
_CDF_ELEMENTS = 1 << 22  # of the tables made at a time: a table for each latent may be more than memory holds


class GaussianMixtureConditional(ScaleTables, compressai.entropy_models.GaussianMixtureConditional):
    """compressai.entropy_models.GaussianMixtureConditional with the likelihood, and its gradient, in one kernel.

    It differs from CompressAI's as lic_fast.entropy.GaussianConditional does, and: compress() and decompress() take a
    limited part of the latents' tables into memory at a time, and _build_cdf() does not change its arguments.

    forward raises what functional.mixture_rate raises. Source: Cheng et al., CVPR 2020; CompressAI.
    """

    _lic_fast_stock = compressai.entropy_models.GaussianMixtureConditional

    def forward(
        self, inputs: Tensor, scales: Tensor, means: Tensor, weights: Tensor, training: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y_hat [B, C, *] of inputs' dtype, likelihoods fp32, or fp64 for fp64).

        inputs [B, C, *]; scales, means, weights [B, K * C, *], component after component, or what broadcasts to that.
        training: quantise by noise, else by rounding; default: the module's mode.
        """
        if self.K > _MOST_COMPONENTS:
            return super().forward(inputs, scales, means, weights, training)
        if training is None:
            training = self.training
        y, mode = inputs, "noise" if training else "dequantize"
        if training and self._lic_fast_torch_noise():
            y, mode = self.quantize(inputs, "noise"), "none"
        channels = self.K * inputs.shape[1]
        shape = (inputs.shape[0], channels, *inputs.shape[2:])
        dtype = common_dtype(inputs, scales, means, weights)
        scales, means, weights = (t[:, :channels].to(dtype).expand(shape) for t in (scales, means, weights))
        bound, scale_bound = self._lic_fast_bounds()
        y_hat, likelihood = mixture_rate(
            y.to(dtype), scales, means, weights,
            quantize=mode, scale_bound=scale_bound, bound=bound, output="likelihood",
        )  # fmt: skip
        return (y if mode == "none" else y_hat.to(inputs.dtype)), likelihood

    @torch.no_grad()
    def _build_cdf(self, scales: Tensor, means: Tensor, weights: Tensor, abs_max: int) -> Tensor:
        return super()._build_cdf(scales.clone(), means.clone(), weights, abs_max)

    def _lic_fast_cdfs(self, parameters: tuple[Tensor, ...], abs_max: int) -> Iterator[Tensor]:
        """The cumulative distributions of the latents, [n, 2 * abs_max + 3] int32 at a time."""
        step = max(1, _CDF_ELEMENTS // (2 * abs_max + 3))
        for parts in zip(*(parameter.split(step, 1) for parameter in parameters), strict=True):
            if parts[0].shape[1]:
                yield self._build_cdf(*parts, abs_max)

    def _lic_fast_parameters(self, channels: int, *floats: Tensor) -> Tensor:
        """The integers of lic_fast's format, [B, 2 + 2 K, C, *] on the CPU, of scales, means, weights [B, K * C, *]."""
        shape = (floats[0].shape[0], self.K, channels, *floats[0].shape[2:])
        scales, means, weights = (t.detach()[:, : self.K * channels].float().cpu().reshape(shape) for t in floats)
        return mixture_parameters(scales.clamp(min=self._lic_fast_bounds()[1]), means, weights, mixture_tables(), dim=1)

    @torch.no_grad()
    def compress(
        self, y: Tensor, scales: Tensor, means: Tensor, weights: Tensor, *, format: str = "compressai"
    ) -> tuple:
        """((stream, abs_max, zero_bitmap [C]), round(y)): one stream for y [1, C, H, W]; CompressAI's bytes.

        scales, means, weights [1, K * C, H, W]. Channels that are zero everywhere are not coded. Raises ValueError for
        more than one sample, which CompressAI's format has no place for, and for no elements.

        format "lic_fast": y [B, C, *] of any size, scales, means, weights [B, K * C, *]; the stream is a list of B
        containers (docs/BITSTREAM.md, section 7), abs_max 0 and zero_bitmap ones, which say nothing. K is 16 at most.
        """
        if is_own("GaussianMixtureConditional.compress", format):
            rounded = torch.round(y)
            parameters = self._lic_fast_parameters(y.shape[1], scales, means, weights)
            strings = encode_samples(rounded, parameters, mixture_tables())
            return (strings, 0, torch.ones(y.shape[1], dtype=torch.int64)), rounded
        if y.dim() != 4 or y.shape[0] != 1 or y.numel() == 0:
            raise ValueError(
                f"GaussianMixtureConditional.compress: y must be [1, C, H, W], got {list(y.shape)}; code one at a time"
            )
        abs_max = max(abs(int(extreme)) for extreme in y.aminmax()) + 1
        y_quantized = torch.round(y)
        zero_bitmap = torch.where(torch.sum(torch.abs(y_quantized), (3, 2)).squeeze(0) == 0, 0, 1)
        nonzero = torch.nonzero(zero_bitmap).flatten().tolist()
        symbols = (y_quantized[:, nonzero] + abs_max).reshape(-1, 1).long()
        starts, ends, place = [], [], 0
        for cdf in self._lic_fast_cdfs(self.reshape_entropy_parameters(scales, means, weights, nonzero), abs_max):
            taken = symbols[place : place + len(cdf)]
            starts.append(cdf.gather(1, taken).flatten().to("cpu", torch.int32))
            ends.append(cdf.gather(1, taken + 1).flatten().to("cpu", torch.int32))
            place += len(cdf)
        empty = torch.empty(0, dtype=torch.int32)
        stream = encode_intervals(torch.cat([empty, *starts]), torch.cat([empty, *ends]))
        return (stream, abs_max, zero_bitmap), y_quantized

    @torch.no_grad()
    def decompress(
        self,
        strings: bytes,
        abs_max: int,
        zero_bitmap: Tensor,
        scales: Tensor,
        means: Tensor,
        weights: Tensor,
        *,
        format: str = "compressai",
    ) -> Tensor:
        """round(y) [1, C, H, W] fp32, on scales' device, from what compress() gives.

        Raises ValueError for more than one sample, for a stream that is truncated, damaged or not of these parameters.

        format "lic_fast": [B, C, *] of any size, from a list of B containers. In both formats scales, means and weights
        must be the encoder's to the last bit.
        """
        if is_own("GaussianMixtureConditional.decompress", format):
            if not isinstance(strings, (list, tuple)) or len(strings) != len(scales):
                raise ValueError(
                    "GaussianMixtureConditional.decompress: format lic_fast has a list of streams, one for each of "
                    f"the {len(scales)} samples of scales, got {type(strings).__name__}; pass what compress gave"
                )
            parameters = self._lic_fast_parameters(scales.shape[1] // self.K, scales, means, weights)
            return decode_samples(strings, parameters, mixture_tables()).to(scales.device, torch.float32)
        if scales.dim() != 4 or scales.shape[0] != 1:
            raise ValueError(
                f"GaussianMixtureConditional.decompress: scales must be [1, K * C, H, W], got {list(scales.shape)}"
            )
        nonzero = torch.nonzero(zero_bitmap).flatten().tolist()
        parameters = self.reshape_entropy_parameters(scales, means, weights, nonzero)
        cdfs = (cdf.to("cpu", torch.int32) for cdf in self._lic_fast_cdfs(parameters, abs_max))
        symbols = decode_rows(strings, cdfs, parameters[0].shape[1]) - abs_max
        y_hat = torch.zeros(1, zero_bitmap.size(0), *scales.shape[2:], device=scales.device)
        if nonzero:
            y_hat[:, nonzero] = symbols.to(scales.device).float().reshape(1, -1, *scales.shape[2:])
        return y_hat

"""CompressAI's EntropyBottleneck on the fused likelihood, and its quantiles without an auxiliary optimizer."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import compressai.entropy_models
import torch
from torch import Tensor, nn

from ..coding import Tables
from ..functional import factorized_rate, pack_factorized
from ._bitstream import tables_of_cdfs
from ._model import OWN_TABLES, FastEntropyModel, common_dtype

__all__ = ["EntropyBottleneck", "solve_quantiles"]

_LISTS = {"matrix": "matrices", "bias": "biases", "factor": "factors"}
_OLD_KEY = re.compile(r"_(matrix|bias|factor)(\d+)|_(matrices|biases|factors)\.(\d+)")
_BISECTIONS = 64


class EntropyBottleneck(FastEntropyModel, compressai.entropy_models.EntropyBottleneck):
    """compressai.entropy_models.EntropyBottleneck with the likelihood, and its gradient, in one kernel.

    Arguments, returns and state dict are CompressAI's; parameters under its old names (_matrix0, _matrices.0) load too.
    Where it differs: with noise "counter" the noise is another; likelihoods are fp32, also in modules and for inputs of
    fp16 and bf16, in which z_hat is; tables never stale (see FastEntropyModel, which also has the settings `bound` and
    `noise`); solve_quantiles() takes the place of the auxiliary loss and its optimizer.

    forward raises what functional.factorized_rate raises. Source: Balle et al., ICLR 2018 (arXiv 1802.01436);
    CompressAI.
    """

    _lic_fast_stock = compressai.entropy_models.EntropyBottleneck

    def _lic_fast_sources(self) -> dict[str, Tensor]:
        lists = {name: getattr(self, name) for name in _LISTS.values()}
        named = {f"{name}.{i}": value for name, values in lists.items() for i, value in enumerate(values)}
        return {**named, "quantiles": self.quantiles}

    def _lic_fast_make(self) -> None:
        self.update(force=True)

    def update(self, force: bool = False, update_quantiles: bool = False) -> bool:
        """Makes the tables where there are none, where they are stale, or by force; returns whether it did."""
        if not (force or self._lic_fast_stale()):
            return False
        extra = {"update_quantiles": True} if update_quantiles else {}
        super().update(force=True, **extra)
        self._lic_fast_stamp()
        return True

    def forward(self, x: Tensor, training: bool | None = None) -> tuple[Tensor, Tensor]:
        """(z_hat [B, C, *] of x's dtype, likelihoods [B, C, *] fp32, or fp64 for fp64).

        x [B, C, *]. training: quantise by noise, else by rounding about the medians; default: the module's mode.
        """
        if training is None:
            training = self.training
        y, mode = x, "noise" if training else "dequantize"
        if training and self._lic_fast_torch_noise():
            y, mode = self._lic_fast_add_noise(x), "none"
        weights = pack_factorized(list(self.matrices), list(self.biases), list(self.factors))
        wide = torch.promote_types(common_dtype(y, weights), torch.float32)
        y_hat, likelihood = factorized_rate(
            y.to(wide) if wide is torch.float64 else y,
            weights.to(wide),
            None if mode != "dequantize" else self._get_medians().reshape(-1).to(wide),
            filters=self.filters,
            quantize=mode,
            bound=self._lic_fast_bounds()[0],
            output="likelihood",
        )
        return (y if mode == "none" else y_hat.to(x.dtype)), likelihood

    @staticmethod
    def _lic_fast_add_noise(x: Tensor) -> Tensor:
        """x with the noise that CompressAI draws for it: channel by channel, for all samples."""
        noise = x.new_empty((x.shape[1], x.shape[0], *x.shape[2:])).uniform_(-0.5, 0.5)
        return (x + noise.transpose(0, 1)).contiguous()

    def compress(self, x: Tensor, *, format: str = "compressai") -> list[bytes]:
        """One stream for each sample of x [B, C, *].

        format: "compressai" (its bytes) or "lic_fast" (docs/BITSTREAM.md). Raises ValueError for shapes and an unknown
        format.
        """
        indexes = self._build_indexes(x.size())
        return super().compress(x, indexes, self._lic_fast_medians(len(x), x.dim() - 2), format=format)

    def decompress(self, strings: list[bytes], size: tuple[int, ...], *, format: str = "compressai") -> Tensor:
        """[B, C, *size] of the parameters' dtype. Raises what GaussianConditional.decompress raises."""
        if not isinstance(strings, (tuple, list)):
            raise ValueError("Invalid `strings` parameter type.")
        indexes = self._build_indexes((len(strings), self.quantized_cdf.size(0), *size))
        medians = self._lic_fast_medians(len(strings), len(size))
        return FastEntropyModel.decompress(self, strings, indexes, medians.dtype, medians, format=format)

    def _lic_fast_tables(self) -> Tables:
        """Of CompressAI's tables, which are the trained density in integers and are in every state dict."""
        return self._lic_fast_kept(
            OWN_TABLES, lambda: tables_of_cdfs(self._quantized_cdf, self._cdf_length, self._offset)
        )

    def _lic_fast_medians(self, samples: int, dims: int) -> Tensor:
        medians = self._extend_ndims(self._get_medians().detach(), dims)
        return medians.expand(samples, *([-1] * (dims + 1)))

    def solve_quantiles(self, *, radius: float = 1e5) -> None:
        """Sets `quantiles` to where the density's tails and its half lie: the function solve_quantiles for one module.

        Raises ValueError for parameters that are not finite.
        """
        _solve(self, radius)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix + "_")]:
            old = _OLD_KEY.fullmatch(key[len(prefix) :])
            if old:
                name = _LISTS[old[1]] if old[1] else old[3]
                state_dict[f"{prefix}{name}.{old[2] or old[4]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def solve_quantiles(model: nn.Module, *, radius: float = 1e5) -> int:
    """Sets the quantiles of every entropy bottleneck in `model` (or `model` itself); returns how many there are.

    CompressAI's auxiliary loss is zero where the cumulative is tail_mass / 2, a half, and 1 - tail_mass / 2 at a
    channel's three quantiles. This finds them by 64 bisections in fp64: to the precision of fp32, or 1e-13 near zero.
    One call after training, or before each evaluation, takes the place of the auxiliary loss, its optimizer and its
    learning rate. Takes lic_fast's modules and CompressAI's. Quantiles outside of [-radius, radius] become its ends, as
    with CompressAI's search, with a RuntimeWarning: tables that wide would not fit into memory.

    Raises ValueError for parameters that are not finite. Source: our choice.
    """
    ours = (compressai.entropy_models.EntropyBottleneck, compressai.entropy_models.EntropyBottleneckVbr)
    bottlenecks = [module for module in model.modules() if isinstance(module, ours)]
    for bottleneck in bottlenecks:
        _solve(bottleneck, radius)
    return len(bottlenecks)


@torch.no_grad()
def _solve(bottleneck: nn.Module, radius: float) -> None:
    twin = copy.deepcopy(bottleneck).double()

    def logits(values: Tensor) -> Tensor:
        return twin._logits_cumulative(values, stop_gradient=True)

    quantiles = bottleneck.quantiles
    target = twin.target
    low = torch.full(quantiles.shape, -radius, dtype=torch.float64, device=quantiles.device)
    high = -low
    ends = logits(low), logits(high)
    if not all(bool(torch.isfinite(end).all()) for end in ends):
        raise ValueError(
            "solve_quantiles: the density is not finite; its parameters have NaN or Inf, look for where they came from"
        )
    beyond = ((ends[0] > target) | (ends[1] < target)).any(2).sum()
    if beyond:
        warnings.warn(
            f"solve_quantiles: {int(beyond)} of {len(quantiles)} channels have quantiles beyond {radius:g}, which they "
            "become; the density is not trained, or far too wide",
            RuntimeWarning,
            stacklevel=3,
        )
    # The cumulative grows strictly: where the end does not reach the target, every middle moves that way.
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = logits(middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    quantiles.copy_((low + high) / 2)

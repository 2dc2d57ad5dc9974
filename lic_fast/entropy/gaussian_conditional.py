"""CompressAI's GaussianConditional on the fused likelihood."""

from __future__ import annotations

import compressai.entropy_models
import torch
from torch import Tensor

from .. import coding
from ..functional import gaussian_rate
from ._model import FastEntropyModel, common_dtype

__all__ = ["GaussianConditional"]

_FIRST_LEVEL_ENDS = 0.11328125  # of the scales that select level 0: a bound below it changes no index


class ScaleTables(FastEntropyModel):
    """What GaussianConditional and GaussianMixtureConditional share: tables made from a table of scales."""

    def _lic_fast_sources(self) -> dict[str, Tensor]:
        return {"scale_table": self.scale_table}

    def _lic_fast_make(self) -> None:
        self.update()

    def update(self) -> None:
        """Makes the tables of the module's scale_table; without one, of CompressAI's, 64 scales from 0.11 to 256."""
        if self.scale_table.numel() == 0:
            from compressai.models.base import get_scale_table

            self.scale_table = self._prepare_scale_table(get_scale_table()).to(self.scale_table)
        super().update()
        self._lic_fast_stamp()

    def update_scale_table(self, scale_table: Tensor | list[float], force: bool = False) -> bool:
        """Sets scale_table and makes its tables. Where there are tables and force is not set, these stay.

        They are made anew where they are stale. Returns whether tables were made.
        """
        if self._offset.numel() > 0 and not force:
            stale = self._lic_fast_stale()
            if stale:
                self._lic_fast_make()
            return stale
        return super().update_scale_table(scale_table, force=True)

    def build_indexes(self, scales: Tensor) -> Tensor:
        """int32 of scales' shape: how many of scale_table, its last left out, are smaller than each scale.

        That is the first entry that is not smaller, or the last one: CompressAI's indexes, NaN (the last) included.
        """
        if self.scale_table.numel() == 0:
            self._lic_fast_refresh()
        scales = torch.max(scales.detach(), self.lower_bound_scale.bound).contiguous()
        # CompressAI compares with one entry after the other: their order does not matter
        smaller = self.scale_table[:-1].to(scales.dtype).sort().values
        return torch.bucketize(scales, smaller, out_int32=True)


class GaussianConditional(ScaleTables, compressai.entropy_models.GaussianConditional):
    """compressai.entropy_models.GaussianConditional with the likelihood, and its gradient, in one kernel.

    Arguments, returns and state dict are CompressAI's. Where it differs: with noise "counter" the noise is another;
    likelihoods are fp32, also in modules and for inputs of fp16 and bf16, in which y_hat is (rounded after the
    likelihood was taken); a table of scales is not needed, and tables never stale (see FastEntropyModel, which also has
    the settings `bound` and `noise`). compress() and decompress() have format="lic_fast", for indexes of
    scale_indexes() or scales, coded with the constant tables that ship with lic_fast.

    forward raises what functional.gaussian_rate raises. Source: Balle et al., ICLR 2018 (arXiv 1802.01436); CompressAI.
    """

    _lic_fast_stock = compressai.entropy_models.GaussianConditional

    def forward(
        self, inputs: Tensor, scales: Tensor, means: Tensor | None = None, training: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y_hat of inputs' shape and dtype, likelihoods fp32, or fp64 for fp64).

        scales, means: broadcast with inputs. training: quantise by noise, else by rounding about the means; default:
        the module's mode.
        """
        if training is None:
            training = self.training
        mode, outputs = "noise" if training else "dequantize", None
        shape = torch.broadcast_shapes(*(t.shape for t in (inputs, scales, means) if t is not None))
        if shape != inputs.shape or (training and self._lic_fast_torch_noise()):
            outputs = self.quantize(inputs, mode, means)
            mode = "none"
        dtype = common_dtype(inputs, scales, means)
        y, scales, means = (
            None if t is None else t.to(dtype).expand(shape)
            for t in (inputs if outputs is None else outputs, scales, means)
        )
        bound, scale_bound = self._lic_fast_bounds()
        y_hat, likelihood = gaussian_rate(
            y, scales, means, quantize=mode, scale_bound=scale_bound, bound=bound, output="likelihood"
        )
        return (y_hat.to(inputs.dtype) if outputs is None else outputs), likelihood

    def scale_indexes(self, scales: Tensor) -> Tensor:
        """The indexes of format="lic_fast", int32 of scales' shape on its device: 0 to 243, 16 to an octave of scale.

        What build_indexes() is to CompressAI's format; the module's scale_table plays no part, its bound on scales
        does. The bits of fp32 decide (other floating dtypes are converted first): a scale that differs in its last bit
        may have another index. Encoder and decoder must come to their scales by the same arithmetic, on the same kind
        of device.
        Raises TypeError for scales that are not of a floating dtype.
        """
        return coding.scale_indexes(self._lic_fast_scales(scales))

    def _lic_fast_scales(self, scales: Tensor) -> Tensor:
        scales = scales.detach()
        if scales.is_floating_point():
            scales = scales.float()
        bound = self._lic_fast_number("scale", self.lower_bound_scale.bound)
        return scales.clamp(min=bound) if bound >= _FIRST_LEVEL_ENDS and scales.is_floating_point() else scales

    def _lic_fast_levels(self, indexes: Tensor) -> Tensor:
        """Scales, of any floating dtype, are indexes too: the coder takes the level of each itself."""
        return self._lic_fast_scales(indexes) if indexes.is_floating_point() else indexes

    def _lic_fast_tables(self) -> coding.Tables:
        return coding.constant_tables("gaussian")

"""Serial (pixel by pixel) coding of CompressAI's autoregressive models, bit for bit as they do it, but faster.

accelerated(type(model)) is a class with the same fields, so that `model.__class__` can be set to it and back: no state,
parameter or buffer is added. Streams and decoded latents are those of the stock classes to the bit; what is saved is
converting the tables to lists at every pixel, 190 small ops that look an index up, reordering the weights of the
context convolution at every pixel, and threads that wait for each other over convolutions of a single pixel.

On a GPU, in another dtype than fp32, under autocast, or with a gaussian_conditional whose methods were overridden, the
stock methods run.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compressai.entropy_models import GaussianConditional
from compressai.latent_codecs import RasterScanLatentCodec
from compressai.latent_codecs.rasterscan import default_collate
from compressai.models.google import JointAutoregressiveHierarchicalPriors
from compressai.ops import LowerBound
from torch import Tensor

from ..functional import context_conv, context_conv_pack
from ._coder import Coder, coder_of, prefers_stock
from ._threads import number_of_threads

_METHODS = ("build_indexes", "quantize", "dequantize")


def _is_stock(gaussian_conditional: Any) -> bool:
    """Whether indexes, symbols and values are made as CompressAI makes them, which _Pixels does in fewer steps."""
    kind = type(gaussian_conditional)
    if not isinstance(gaussian_conditional, GaussianConditional):
        return False
    if any(name in vars(gaussian_conditional) for name in _METHODS):
        return False
    own = (getattr(kind, name).__module__.split(".")[0] in ("compressai", "lic_fast") for name in _METHODS)
    table = gaussian_conditional.scale_table
    return (
        all(own)
        and type(gaussian_conditional.lower_bound_scale) is LowerBound
        and len(table) > 0
        and bool((table[1:] >= table[:-1]).all())
    )


def _takes(gaussian_conditional: Any, *tensors: Tensor) -> bool:
    """Whether the fast loops can code these tensors; where not, the stock ones do."""
    return (
        all(t.device.type == "cpu" and t.dtype is torch.float32 for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and _is_stock(gaussian_conditional)
    )


class _Pixels:
    """The means and indexes of one image's pixels, in raster order, from what is decoded so far."""

    def __init__(
        self, gaussian_conditional: GaussianConditional, network: Callable[[Tensor], Tensor], weight: Tensor,
        bias: Tensor | None, merge: Callable[..., Tensor], y_hat: Tensor, params: Tensor, masked: bool,
    ) -> None:  # fmt: skip
        self._bound = gaussian_conditional.lower_bound_scale.bound
        self._scales = gaussian_conditional.scale_table[:-1]
        self._network, self._merge = network, merge
        self._weight, self._bias = weight, bias
        self._y_hat, self._params = y_hat, params
        self._kernel = weight.shape[-1]
        self._packed: Tensor | None = None
        self.threads = self._choose(masked)

    def _context(self, crop: Tensor) -> Tensor:
        if self._packed is None:
            return F.conv2d(crop, self._weight, self._bias)
        return context_conv(crop, self._weight, self._packed, bias=self._bias)

    def _evaluate(self, crop: Tensor, p: Tensor) -> Tensor:
        return self._network(self._merge(p, self._context(crop)))

    def _choose(self, masked: bool) -> int:
        """Takes context_conv for the context where it gives the stock convolution's bits; returns how many threads to
        use, 1 where that gives the bits that PyTorch's number of threads gives.

        Any other order of a sum shows in the values of a random pixel: hundreds of sums over hundreds of terms.
        """
        generator = torch.Generator().manual_seed(0)
        crop = torch.randn((1, self._weight.shape[1], self._kernel, self._kernel), generator=generator)
        before = (torch.arange(self._kernel**2) < self._kernel**2 // 2).view(self._kernel, self._kernel)
        crop = torch.where(before, crop, 0.0)
        p = torch.randn((1, self._params.shape[1], 1, 1), generator=generator)
        context, stock = self._context(crop), self._evaluate(crop, p)
        # What the kernel leaves out must be products with zero: of the weights here, or of what is not decoded yet.
        skips = torch.isfinite(self._weight).all() and torch.isfinite(self._y_hat).all()
        if masked:
            skips = skips and not torch.where(before, 0.0, self._weight).any()
        if skips and self._kernel % 2 and not prefers_stock("context_conv", torch.float32):
            packed = context_conv_pack(self._weight)
            if torch.equal(context_conv(crop, self._weight, packed, bias=self._bias), context):
                self._packed = packed
        count = torch.get_num_threads()
        with number_of_threads(1):
            return 1 if torch.equal(self._evaluate(crop, p), stock) else count

    def at(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """(means, indexes), both [1, M, 1, 1], of pixel (h, w)."""
        crop = self._y_hat[:, :, h : h + self._kernel, w : w + self._kernel]
        gaussian_params = self._evaluate(crop, self._params[:, :, h : h + 1, w : w + 1])
        scales, means = gaussian_params.chunk(2, 1)
        scales = torch.maximum(scales, self._bound)
        return means, torch.bucketize(scales, self._scales, out_int32=True)


def _compress(pixels: Callable[[], _Pixels], coder: Coder, y_hat: Tensor, height: int, width: int, pad: int) -> bytes:
    """Codes y, which lies in y_hat inside `pad` pixels, and leaves what a decoder will have in its place."""
    with torch.inference_mode():
        step = pixels()
        with number_of_threads(step.threads):
            symbols: list[Tensor] = []
            indexes: list[Tensor] = []
            for h in range(height):
                for w in range(width):
                    means, index = step.at(h, w)
                    y = y_hat[:, :, h + pad : h + pad + 1, w + pad : w + pad + 1]
                    symbol = (y - means).round_().int()
                    torch.add(symbol, means, out=y)
                    symbols.append(symbol.flatten())
                    indexes.append(index.flatten())
            empty = torch.empty(0, dtype=torch.int32)
            return coder.encode(torch.cat([empty, *symbols]), torch.cat([empty, *indexes]))


def _decompress(
    pixels: Callable[[], _Pixels], coder: Coder, stream: bytes, y_hat: Tensor, height: int, width: int, pad: int
) -> None:
    """Decodes into y_hat, zeros inside and outside of `pad` pixels."""
    with torch.inference_mode():
        step, decoder = pixels(), coder.decoder(stream)
        with number_of_threads(step.threads):
            for h in range(height):
                for w in range(width):
                    means, index = step.at(h, w)
                    y = y_hat[:, :, h + pad : h + pad + 1, w + pad : w + pad + 1]
                    torch.add(decoder.decode(index).float(), means, out=y)


class _Accelerated:
    """What every accelerated class shares: it is pickled and copied as the class that it stands for."""

    _lic_fast_stock: type

    def __reduce_ex__(self, protocol: int) -> Any:
        made = super().__reduce_ex__(protocol)
        if made[0] is copyreg.__newobj__ and made[1] == (type(self),):
            return (_remade, (self._lic_fast_stock,), *made[2:])
        return made


def _remade(stock: type) -> Any:
    kind = accelerated(stock)
    return kind.__new__(kind)


class _JointAutoregressive(_Accelerated):
    """Replaces the loops of JointAutoregressiveHierarchicalPriors and of what inherits them (Cheng2020Anchor, ...)."""

    def _lic_fast_pixels(self, y_hat: Tensor, params: Tensor, weight: Tensor, masked: bool) -> Callable[[], _Pixels]:
        return lambda: _Pixels(
            self.gaussian_conditional, self.entropy_parameters, weight, self.context_prediction.bias,
            RasterScanLatentCodec.merge, y_hat, params, masked,
        )  # fmt: skip

    def _compress_ar(
        self, y_hat: Tensor, params: Tensor, height: int, width: int, kernel_size: int, padding: int
    ) -> bytes:
        if not _takes(self.gaussian_conditional, y_hat, params):
            return super()._compress_ar(y_hat, params, height, width, kernel_size, padding)
        weight = (self.context_prediction.weight * self.context_prediction.mask).detach()
        pixels = self._lic_fast_pixels(y_hat, params, weight, True)
        return _compress(pixels, coder_of(self.gaussian_conditional), y_hat, height, width, padding)

    def _decompress_ar(
        self, y_string: bytes, y_hat: Tensor, params: Tensor, height: int, width: int, kernel_size: int, padding: int
    ) -> None:
        if not _takes(self.gaussian_conditional, y_hat, params):
            return super()._decompress_ar(y_string, y_hat, params, height, width, kernel_size, padding)
        pixels = self._lic_fast_pixels(y_hat, params, self.context_prediction.weight.detach(), False)
        _decompress(pixels, coder_of(self.gaussian_conditional), y_string, y_hat, height, width, padding)
        return None


class _RasterScan(_Accelerated):
    """Replaces compress and decompress of RasterScanLatentCodec."""

    def _lic_fast_pixels(self, y_hat: Tensor, params: Tensor) -> Callable[[], _Pixels]:
        weight = (self.context_prediction.weight * self.context_prediction.mask).detach()
        return lambda: _Pixels(
            self.gaussian_conditional, self.entropy_parameters, weight, self.context_prediction.bias, self.merge,
            y_hat, params, True,
        )  # fmt: skip

    def compress(self, y: Tensor, ctx_params: Tensor) -> dict[str, Any]:
        if not _takes(self.gaussian_conditional, y, ctx_params):
            return super().compress(y, ctx_params)
        height, width = y.shape[2:]
        coder, pad, items = coder_of(self.gaussian_conditional), self.padding, []
        for i in range(len(y)):
            y_hat = F.pad(y[i : i + 1].detach(), (pad, pad, pad, pad))
            pixels = self._lic_fast_pixels(y_hat, ctx_params[i : i + 1])
            stream = _compress(pixels, coder, y_hat, height, width, pad)
            items.append({"strings": [stream], "y_hat": F.pad(y_hat, (-pad, -pad, -pad, -pad)).squeeze(0)})
        return {**default_collate(items), "shape": y.shape[2:4]}

    def decompress(
        self, strings: list[list[bytes]], shape: tuple[int, int], ctx_params: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        if not _takes(self.gaussian_conditional, ctx_params):
            return super().decompress(strings, shape, ctx_params, **kwargs)
        (streams,) = strings
        (height, width), channels = shape, self.context_prediction.in_channels
        coder, pad, items = coder_of(self.gaussian_conditional), self.padding, []
        for i, stream in enumerate(streams):
            y_hat = torch.zeros((1, channels, height + 2 * pad, width + 2 * pad))
            pixels = self._lic_fast_pixels(y_hat, ctx_params[i : i + 1])
            _decompress(pixels, coder, stream, y_hat, height, width, pad)
            items.append({"y_hat": F.pad(y_hat, (-pad, -pad, -pad, -pad)).squeeze(0)})
        return default_collate(items)


# What is replaced, by the class that brings it: CompressAI's class and the methods that must be its own.
_REPLACED = (
    (_JointAutoregressive, JointAutoregressiveHierarchicalPriors, ("_compress_ar", "_decompress_ar")),
    (_RasterScan, RasterScanLatentCodec, ("compress", "decompress")),
)


def why_not(kind: type) -> str | None:
    """The reason accelerated() refuses a class, or None where it takes it."""
    for mixin, stock, methods in _REPLACED:
        if issubclass(kind, mixin):
            return f"{kind.__name__} is accelerated already"
        if issubclass(kind, stock):
            changed = [name for name in methods if getattr(kind, name) is not getattr(stock, name)]
            return f"{kind.__name__} overrides {' and '.join(changed)}" if changed else None
    return f"{kind.__name__} has no serial coding that is known"


@functools.cache
def accelerated(kind: type) -> type:
    """A subclass of `kind` whose serial coding is fast: JointAutoregressiveHierarchicalPriors (mbt2018),
    Cheng2020Anchor, Cheng2020Attention, RasterScanLatentCodec, and classes derived from these.

    Instances have the layout of kind's: set `obj.__class__ = accelerated(type(obj))`, and back to the base class to
    undo it. One class for each kind, of the same name; instances pickle and copy as themselves. While the loops run
    PyTorch has one thread, for the whole process, where that does not change the bits; it is set back afterwards.

    Raises TypeError, naming the reason that why_not gives.
    Source: the loops of CompressAI (models/google.py, latent_codecs/rasterscan.py).
    """
    reason = why_not(kind)
    if reason is not None:
        raise TypeError(f"accelerated: {reason}; it keeps its own methods")
    mixin = next(mixin for mixin, stock, _ in _REPLACED if issubclass(kind, stock))
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (mixin, kind), {**names, "_lic_fast_stock": kind})

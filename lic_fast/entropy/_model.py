"""What the drop-ins for CompressAI's entropy models share: settings, tables that refresh themselves, and coding.

The drop-ins need no state of their own, so that an instance of CompressAI's class becomes one by `module.__class__ =`
and back. What they keep in the instance is made when it is needed and dropped by _lic_fast_restored().
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from compressai.entropy_models import EntropyModel
from torch import Tensor

from ..coding import Tables
from ..functional.likelihood import COMPRESSAI_BOUND
from ._bitstream import decode_samples, encode_samples, is_own
from ._coder import Coder

_TABLES = ("_quantized_cdf", "_cdf_length", "_offset")
_MADE_FROM, _CODER, _NUMBERS = "_lic_fast_values_then", "_lic_fast_coding", "_lic_fast_numbers"
OWN_TABLES = "_lic_fast_own_tables"
_CACHES = (_CODER, _NUMBERS, OWN_TABLES)
_ROUNDED = {dtype: float(torch.tensor(COMPRESSAI_BOUND, dtype=dtype)) for dtype in (torch.float16, torch.bfloat16)}
BOUNDS, NOISES = ("compressai", "none"), ("counter", "torch")


@torch.compiler.assume_constant_result
def _constant(buffer: Tensor) -> float:
    """A bound as a constant of the graph that is being compiled."""
    return float(buffer.item())


class FastEntropyModel(EntropyModel):
    """The part of a drop-in that does not depend on the density.

    Settings, attributes of the class that an instance may override:

    bound: "compressai" (likelihoods are at least the module's likelihood_bound, and gradients vanish there, beyond 6.5
        sigma of a Gaussian) or "none" (likelihoods and gradients are right at any distance). torch.compile takes the
        values of likelihood_bound and scale_bound as constants.
    noise: "counter" (noise of the fused op, from one number drawn from PyTorch's generator) or "torch" (the numbers
        that CompressAI draws, in the same order, so that a training repeats one of CompressAI's).

    Tables. quantized_cdf, cdf_length, offset, compress() and decompress() make the tables where there are none, and
    make them anew where they are stale: where a value of what they were made from (EntropyBottleneck: matrices, biases,
    factors, quantiles; the others: scale_table) is another than it was then. The values themselves are compared: a
    change by any way counts, and a step that changes nothing does not. Tables that came with a state dict belong to the
    values that came with them; tables that CompressAI's class made, to those at the time of accelerate(); others, to
    those at their first use. They are kept, bit for bit, until such a value changes. Moving the module to another
    device or dtype keeps them too. Streams decode with the tables that they were coded with: save the state dict after
    update(), or after the first compress(), and give decoders that. What format="lic_fast" codes an EntropyBottleneck
    with is made of these same integers, and so has no place of its own in a state dict.
    """

    bound: str = "compressai"
    noise: str = "counter"
    _lic_fast_stock: ClassVar[type]

    # Settings

    def _lic_fast_bounds(self) -> tuple[float | str, float]:
        """(likelihood bound, scale bound) as numbers, read from the buffers only when these change."""
        if self.bound not in BOUNDS:
            raise ValueError(f"{type(self).__name__}: bound must be one of {', '.join(BOUNDS)}, got {self.bound!r}")
        floor = self.likelihood_lower_bound.bound if self.use_likelihood_bound and self.bound != "none" else None
        lower = getattr(self, "lower_bound_scale", None)
        return (
            "none" if floor is None else _as_was_given(self._lic_fast_number("floor", floor), floor.dtype),
            0.0 if lower is None else self._lic_fast_number("scale", lower.bound),
        )

    def _lic_fast_number(self, name: str, buffer: Tensor) -> float:
        if torch.compiler.is_compiling():
            return _constant(buffer)
        version = 0 if buffer.is_inference() else buffer._version
        kept = self.__dict__.setdefault(_NUMBERS, {})
        if name not in kept or kept[name][0] is not buffer or kept[name][1] != version:
            kept[name] = (buffer, version, float(buffer))
        return kept[name][2]

    def _lic_fast_torch_noise(self) -> bool:
        if self.noise not in NOISES:
            raise ValueError(f"{type(self).__name__}: noise must be one of {', '.join(NOISES)}, got {self.noise!r}")
        return self.noise == "torch"

    # Tables

    _lic_fast_sources: Callable[[], dict[str, Tensor]]  # what the tables are made from, by its name in the state dict
    _lic_fast_make: Callable[[], None]  # makes the tables
    _lic_fast_tables: Callable[[], Tables]  # what format="lic_fast" codes with

    def _lic_fast_values(self) -> Tensor:
        return torch.cat([value.detach().flatten() for value in self._lic_fast_sources().values()])

    def _lic_fast_stamp(self) -> None:
        self.__dict__[_MADE_FROM] = self._lic_fast_values()
        self.__dict__.pop(_CODER, None)
        self.__dict__.pop(OWN_TABLES, None)

    def _lic_fast_stale(self) -> bool:
        """Whether the tables must be made: there are none, or they were made from other values."""
        if any(self._buffers[name].numel() == 0 for name in _TABLES):
            return True
        values = self._lic_fast_values()
        if values.is_meta:
            return False
        made_from = self.__dict__.get(_MADE_FROM)
        if made_from is None:
            self.__dict__[_MADE_FROM] = values
            return False
        return made_from.dtype != values.dtype or not torch.equal(made_from.to(values.device), values)

    def _lic_fast_refresh(self) -> None:
        if self._lic_fast_stale():
            self._lic_fast_make()

    @property
    def quantized_cdf(self) -> Tensor:
        """[M, L] int32, fresh."""
        self._lic_fast_refresh()
        return self._quantized_cdf

    @property
    def cdf_length(self) -> Tensor:
        """[M] int32, fresh."""
        self._lic_fast_refresh()
        return self._cdf_length

    @property
    def offset(self) -> Tensor:
        """[M] int32, fresh."""
        self._lic_fast_refresh()
        return self._offset

    def _lic_fast_kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` makes of the tables as they are now; made anew when one of them is another, or was changed."""
        self._lic_fast_refresh()
        self._check_cdf_size(), self._check_cdf_length(), self._check_offsets_size()
        tables = [self._buffers[table] for table in _TABLES]
        state = [(table, 0 if table.is_inference() else table._version) for table in tables]
        kept, made = self.__dict__.get(name, ((), None))
        if len(kept) != len(state) or any(a is not b or v != w for (a, v), (b, w) in zip(kept, state, strict=True)):
            made = make()
            self.__dict__[name] = (state, made)
        return made

    def _lic_fast_coder(self) -> Coder:
        """The coder of the tables as they are now."""
        coder = self._lic_fast_kept(_CODER, lambda: Coder(self))
        if coder.entropy_coder is not self.entropy_coder:
            self.__dict__.pop(_CODER)
            coder = self._lic_fast_kept(_CODER, lambda: Coder(self))
        return coder

    def _lic_fast_levels(self, indexes: Tensor) -> Tensor:
        """What format="lic_fast" takes for `indexes`."""
        return indexes

    # Life of a module

    def _lic_fast_accelerated(self) -> None:
        """Called when an instance of CompressAI's class has become one of ours: its tables are good as they are."""
        self._lic_fast_forget()
        if all(self._buffers[name].numel() for name in _TABLES):
            self._lic_fast_stamp()

    def _lic_fast_restored(self) -> None:
        """Called before an instance gets CompressAI's class back: removes what is ours from it."""
        self._lic_fast_forget()
        for name in ("bound", "noise"):
            self.__dict__.pop(name, None)

    def _lic_fast_forget(self) -> None:
        for name in (*_CACHES, _MADE_FROM):
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in _CACHES:
            state.pop(name, None)
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> FastEntropyModel:
        fresh = not self._lic_fast_stale()
        super()._apply(fn, recurse)
        for name in _CACHES:
            self.__dict__.pop(name, None)
        if fresh:
            self._lic_fast_stamp()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        resizable = [name for name in (*_TABLES, "scale_table") if name in self._buffers]
        for name in resizable:
            new, own = state_dict.get(prefix + name), self._buffers[name]
            if isinstance(new, Tensor) and own is not None and new.shape != own.shape:
                self._buffers[name] = own.new_empty(new.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(prefix + name in state_dict for name in _TABLES):
            # The parameters' modules are loaded after this one: the values are taken where they come from.
            self._lic_fast_forget()
            sources = self._lic_fast_sources()
            if not any(own.is_meta for own in sources.values()):
                arriving = [(state_dict.get(prefix + name, own), own) for name, own in sources.items()]
                parts = [(new if new.shape == own.shape else own).detach().to(own) for new, own in arriving]
                self.__dict__[_MADE_FROM] = torch.cat([part.flatten() for part in parts])

    # Coding

    def compress(
        self, inputs: Tensor, indexes: Tensor, means: Tensor | None = None, *, format: str = "compressai"
    ) -> list[bytes]:
        """One stream for each sample of inputs [B, ...]: CompressAI's bytes, or containers of lic_fast's bitstream.

        indexes [B, ...]: rows of the tables; means: subtracted before rounding, broadcast. Streams of zero and of one
        symbol work, which CompressAI writes outside its buffer. format: "compressai" or "lic_fast" (docs/BITSTREAM.md),
        for which GaussianConditional takes other indexes, those of scale_indexes() or the scales themselves.
        Raises ValueError for shapes, indexes and an unknown format.
        """
        own = is_own(f"{type(self).__name__}.compress", format)
        symbols = self.quantize(inputs, "symbols", means)
        if inputs.dim() < 2:
            raise ValueError("Invalid `inputs` size. Expected a tensor with at least 2 dimensions.")
        if inputs.size() != indexes.size():
            raise ValueError("`inputs` and `indexes` should have the same size.")
        if own:
            return encode_samples(symbols, self._lic_fast_levels(indexes), self._lic_fast_tables())
        coder = self._lic_fast_coder()
        symbols, indexes = (t.to("cpu", torch.int32).contiguous() for t in (symbols, indexes))
        return [coder.encode(*pair) for pair in zip(symbols, indexes, strict=True)]

    def decompress(
        self,
        strings: list[bytes],
        indexes: Tensor,
        dtype: torch.dtype = torch.float,
        means: Tensor | None = None,
        *,
        format: str = "compressai",
    ) -> Tensor:
        """The values that compress() coded, of indexes' shape, on the tables' device: means' dtype, or `dtype`.

        format, indexes: those of compress().
        Raises ValueError for arguments that do not fit each other and an unknown format, TypeError for a stream that is
        not bytes, BitstreamError (a ValueError) for one that is truncated; of lic_fast's format also for one that is
        damaged, of another format, or was made with other indexes, tables or shapes.
        """
        own = is_own(f"{type(self).__name__}.decompress", format)
        if not isinstance(strings, (tuple, list)):
            raise ValueError("Invalid `strings` parameter type.")
        if len(strings) != indexes.size(0):
            raise ValueError("Invalid strings or indexes parameters")
        if indexes.dim() < 2:
            raise ValueError("Invalid `indexes` size. Expected a tensor with at least 2 dimensions.")
        coder = None if own else self._lic_fast_coder()
        if means is not None:
            if means.size()[:2] != indexes.size()[:2]:
                raise ValueError("Invalid means or indexes parameters")
            if means.size() != indexes.size() and any(size != 1 for size in means.size()[2 : indexes.dim()]):
                raise ValueError("Invalid means parameters")
        if coder is None:
            outputs = decode_samples(strings, self._lic_fast_levels(indexes), self._lic_fast_tables())
        else:
            rows = indexes.to("cpu", torch.int32).contiguous()
            outputs = torch.empty(rows.shape, dtype=torch.int32)
            for i, stream in enumerate(strings):
                outputs[i] = coder.decode(stream, rows[i])
        return self.dequantize(outputs.to(self._quantized_cdf.device), means, dtype)


def _as_was_given(bound: float, dtype: torch.dtype) -> float:
    """The bound of a module converted to `dtype`, before its usual value 1e-9 was rounded (to 0, in fp16)."""
    return COMPRESSAI_BOUND if bound == _ROUNDED.get(dtype) else bound


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to which PyTorch promotes the tensors."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))

"""Which coder the drop-in models use: lic_fast's, or CompressAI's own where only the slow reference could run."""

from __future__ import annotations

import torch
from compressai.ans import RansDecoder, RansEncoder
from compressai.entropy_models import EntropyModel
from torch import Tensor

from .._dispatch import explain
from ..coding import Decoder, Tables, encode


def prefers_stock(op: str, dtype: torch.dtype) -> bool:
    """Whether auto mode has nothing but the reference for `op` on the CPU, slower than what CompressAI does."""
    told = explain(op, "cpu", dtype)
    return told.chosen == "reference" and not told.forced


class Coder:
    """Codes with the tables of an entropy model as they are now; both coders write and read the same bytes."""

    def __init__(self, model: EntropyModel) -> None:
        tables = (model.quantized_cdf, model.cdf_length, model.offset)
        self._lists = [table.tolist() for table in tables] if prefers_stock("ans_coder_decode_", torch.int32) else None
        self._tables = Tables(*tables) if self._lists is None else None

    def encode(self, symbols: Tensor, indexes: Tensor) -> bytes:
        """The stream of int32 symbols."""
        if self._lists is None:
            return encode(symbols, indexes, self._tables)
        return RansEncoder().encode_with_indexes(symbols.flatten().tolist(), indexes.flatten().tolist(), *self._lists)

    def decoder(self, stream: bytes) -> Decoder | _CompressAIDecoder:
        """What decodes `stream` piece by piece."""
        if self._lists is None:
            return Decoder(stream, self._tables)
        return _CompressAIDecoder(stream, self._lists)


class _CompressAIDecoder:
    def __init__(self, stream: bytes, lists: list) -> None:
        self._decoder, self._lists = RansDecoder(), lists
        self._decoder.set_stream(stream)

    def decode(self, indexes: Tensor) -> Tensor:
        symbols = self._decoder.decode_stream(indexes.flatten().tolist(), *self._lists)
        return torch.tensor(symbols, dtype=torch.int32).view(indexes.shape)

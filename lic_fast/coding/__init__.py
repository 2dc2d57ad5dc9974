"""Entropy coders: symbols to bytes and back.

The names here are lic_fast's own bitstream (docs/BITSTREAM.md). CompressAI's is in lic_fast.coding.compressai_format.
"""

from __future__ import annotations

from ..functional.coding import BitstreamError
from .mixtures import MIXTURE_FAMILIES, MixtureTables, mixture_parameters, mixture_tables
from .rans import (
    Decoder,
    Encoder,
    RateReport,
    decode,
    decode_batch,
    encode,
    encode_batch,
    rate_report,
    scale_indexes,
)
from .slots import Slots
from .tables import FAMILIES, LADDER_LEVELS, Tables, constant_tables, factorized_tables, join_tables

__all__ = [
    "FAMILIES",
    "LADDER_LEVELS",
    "MIXTURE_FAMILIES",
    "BitstreamError",
    "Decoder",
    "Encoder",
    "MixtureTables",
    "RateReport",
    "Slots",
    "Tables",
    "constant_tables",
    "decode",
    "decode_batch",
    "encode",
    "encode_batch",
    "factorized_tables",
    "join_tables",
    "mixture_parameters",
    "mixture_tables",
    "rate_report",
    "scale_indexes",
]

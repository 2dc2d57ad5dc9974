"""Image codecs: the container in which a compressed photograph is stored, and image models of our own."""

from __future__ import annotations

from lic_fast.codec.cdc import CDC, CDC_NAMES
from lic_fast.codec.container import BitstreamError, Stream, pack, unpack
from lic_fast.codec.msp import MSP_NAMES, MSPCodec
from lic_fast.codec.overfit import Overfit, overfit
from lic_fast.codec.replace import replace_context_model

__all__ = [
    "CDC",
    "CDC_NAMES",
    "MSP_NAMES",
    "BitstreamError",
    "MSPCodec",
    "Overfit",
    "Stream",
    "overfit",
    "pack",
    "replace_context_model",
    "unpack",
]

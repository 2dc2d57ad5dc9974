"""Entropy coders: symbols to bytes and back."""

from __future__ import annotations

from ..functional.coding import BitstreamError
from .compressai_format import Decoder, Encoder, Tables, decode, encode

__all__ = ["BitstreamError", "Decoder", "Encoder", "Tables", "decode", "encode"]

"""Image codecs: the container in which a compressed photograph is stored."""

from __future__ import annotations

from lic_fast.codec.container import BitstreamError, Stream, pack, unpack

__all__ = ["BitstreamError", "Stream", "pack", "unpack"]

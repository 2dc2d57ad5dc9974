"""Optimizers and what wraps them."""

from .sma import SMA

__all__ = ["SMA"]

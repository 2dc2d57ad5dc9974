"""Optimizers and what wraps them."""

from ._param_groups import param_groups
from .sma import SMA
from .soap import SOAP

__all__ = ["SMA", "SOAP", "param_groups"]

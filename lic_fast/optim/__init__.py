"""Optimizers and what wraps them."""

from ._param_groups import param_groups
from .sma import SMA
from .soap import SOAP
from .stdet import STDET

__all__ = ["SMA", "SOAP", "STDET", "param_groups"]

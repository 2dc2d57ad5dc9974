"""One op a module: schema, fake, table of implementations, autograd. Importing it defines the ops."""

from . import adam_update, affine_reconstruct, refresh_eigenbasis, rotate_moments, sma_update, soap_update, stdet

__all__ = [
    "adam_update",
    "affine_reconstruct",
    "refresh_eigenbasis",
    "rotate_moments",
    "sma_update",
    "soap_update",
    "stdet",
]

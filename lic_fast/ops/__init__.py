"""One op a module: schema, fake, table of implementations, autograd. Importing it defines the ops."""

from . import affine_reconstruct, sma_update

__all__ = ["affine_reconstruct", "sma_update"]

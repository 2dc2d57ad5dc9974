"""The public stateless API."""

from .parameters import affine_reconstruct, affine_reconstruct_, sma_update_

__all__ = ["affine_reconstruct", "affine_reconstruct_", "sma_update_"]

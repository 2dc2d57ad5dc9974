"""The public stateless API."""

from .embedding import FlatLayout, stdet_adam_step_, stdet_mask_, stdet_reconstruct_
from .parameters import affine_reconstruct, affine_reconstruct_, sma_update_
from .preconditioning import adam_update_, refresh_eigenbasis, rotate_moments_, soap_update_

__all__ = [
    "FlatLayout",
    "adam_update_",
    "affine_reconstruct",
    "affine_reconstruct_",
    "refresh_eigenbasis",
    "rotate_moments_",
    "sma_update_",
    "soap_update_",
    "stdet_adam_step_",
    "stdet_mask_",
    "stdet_reconstruct_",
]

"""The public stateless API."""

from .attention import linear_attention, linear_attention_context
from .coding import ans_decode_, ans_encode, ans_pack
from .context import context_conv, context_conv_pack
from .diffusion import ddim_update, q_sample, q_sample_loss
from .embedding import FlatLayout, in_memory_order, stdet_adam_step_, stdet_mask_, stdet_reconstruct_
from .integer import integer_conv2d, integer_conv2d_pack
from .layers import channel_norm, gdn
from .likelihood import (
    factorized_rate,
    gaussian_rate,
    laplace_rate,
    logistic_rate,
    mixture_rate,
    pack_factorized,
)
from .modes import cmd_assign, embed_select, rls_update_, sensitivity_accumulate_
from .parameters import affine_reconstruct, affine_reconstruct_, sma_update_
from .preconditioning import adam_update_, refresh_eigenbasis, rotate_moments_, soap_update_
from .rans import rans_check, rans_decode_, rans_encode, rans_lanes, rans_open, rans_pack, rans_reconstruct_
from .rans_mixture import mixture_parameters, rans_pack_mixture
from .schedule import schedule_dequantize_, schedule_levels, schedule_quantize_

__all__ = [
    "FlatLayout",
    "adam_update_",
    "affine_reconstruct",
    "affine_reconstruct_",
    "ans_decode_",
    "ans_encode",
    "ans_pack",
    "channel_norm",
    "cmd_assign",
    "context_conv",
    "context_conv_pack",
    "ddim_update",
    "embed_select",
    "factorized_rate",
    "gaussian_rate",
    "gdn",
    "in_memory_order",
    "integer_conv2d",
    "integer_conv2d_pack",
    "laplace_rate",
    "linear_attention",
    "linear_attention_context",
    "logistic_rate",
    "mixture_parameters",
    "mixture_rate",
    "pack_factorized",
    "q_sample",
    "q_sample_loss",
    "rans_check",
    "rans_decode_",
    "rans_encode",
    "rans_lanes",
    "rans_open",
    "rans_pack",
    "rans_pack_mixture",
    "rans_reconstruct_",
    "refresh_eigenbasis",
    "rls_update_",
    "rotate_moments_",
    "schedule_dequantize_",
    "schedule_levels",
    "schedule_quantize_",
    "sensitivity_accumulate_",
    "sma_update_",
    "soap_update_",
    "stdet_adam_step_",
    "stdet_mask_",
    "stdet_reconstruct_",
]

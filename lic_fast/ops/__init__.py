"""One op a module: schema, fake, table of implementations, autograd. Importing it defines the ops."""

from . import (
    adam_update,
    affine_reconstruct,
    ans_coder,
    cmd_assign,
    context_conv,
    embed_select,
    factorized_rate,
    gdn,
    mixture_rate,
    refresh_eigenbasis,
    rls_update,
    rotate_moments,
    sensitivity_accumulate,
    sma_update,
    soap_update,
    stdet,
)

__all__ = [
    "adam_update",
    "affine_reconstruct",
    "ans_coder",
    "cmd_assign",
    "context_conv",
    "embed_select",
    "factorized_rate",
    "gdn",
    "mixture_rate",
    "refresh_eigenbasis",
    "rls_update",
    "rotate_moments",
    "sensitivity_accumulate",
    "sma_update",
    "soap_update",
    "stdet",
]

"""Benchmarks on the tensors of real models: `python -m lic_fast.benchmarks [op ...]`.

Every op is one module with `groups(settings)`; its rows are appended to results/<op>.csv. What is no single op is
one module with `comparisons(settings)`.
"""

from __future__ import annotations

OPS = (
    "affine_reconstruct",
    "sma_update",
    "adam_update",
    "soap_update",
    "refresh_eigenbasis",
    "rotate_moments",
    "stdet",
    "rls_update",
    "sensitivity_accumulate",
    "cmd_assign",
    "embed_select",
    "ans_coder",
    "rans_coder",
    "context_conv",
    "schedule",
    "integer_conv2d",
    "gdn",
    "channel_norm",
    "linear_attention",
    "ddim_update",
    "q_sample",
    "mixture_rate",
    "factorized_rate",
)
WHOLE = ("soap", "stdet_training", "decompress")

__all__ = ["OPS", "WHOLE"]

"""Benchmarks on the tensors of real models: `python -m lic_fast.benchmarks [op ...]`.

Every op is one module with `groups(settings)`; its rows are appended to results/<op>.csv.
"""

from __future__ import annotations

OPS = ("affine_reconstruct", "sma_update")

__all__ = ["OPS"]

"""Attention whose cost is linear in the number of places."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops._library import FLOATS
from . import _check


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, heads: int = 1, scale: float | None = None) -> Tensor:
    """softmax(k) taken over the places, summed with v into a matrix a head, which every scaled query is multiplied by.

    With N places, y = (v softmax_N(k)^T) scale q for each sample and head: nothing of the size N x N is made. q and k
    [B, heads K, *], v [B, heads V, *], of one dtype (fp32, bf16, fp16, fp64) and the same places; a head's channels
    are neighbours. scale: None is K ** -0.5. Returns [B, heads V, *] of that dtype. Queries are not normalized.
    See linear_attention_context, which does the sum and has its gradients; the product with q is torch.matmul's.

    Raises ValueError for shapes, heads and scale, TypeError for dtypes and devices, BackendError for a forced backend.

    Source: Shen et al., "Efficient Attention: Attention with Linear Complexities" (WACV 2021), with the normalization
    that the U-Net of CDC has (Yang and Mandt, NeurIPS 2023).
    """
    f = "linear_attention"
    _check.tensor(f, "q", q)
    _checked(f, k, v)
    if q.shape != k.shape:
        raise ValueError(f"{f}: q must have the shape of k, got {list(q.shape)} and {list(k.shape)}")
    if q.dtype != k.dtype:
        raise TypeError(f"{f}: q, k and v must have one dtype, got {q.dtype} and {k.dtype}; convert with .to()")
    _check.same_device(f, ("k", k), ("q", q))
    if not isinstance(heads, int) or heads < 1 or k.shape[1] % heads or v.shape[1] % heads:
        raise ValueError(f"{f}: heads must divide the channels {k.shape[1]} and {v.shape[1]}, got {heads!r}")
    each = k.shape[1] // heads
    if scale is None:
        scale = each**-0.5
    if not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"{f}: scale must be a finite number, got {scale!r}")
    tokens = (t if t.dim() > 2 else t.unsqueeze(2) for t in (q, k, v))
    queries, keys, values = (t.unflatten(1, (heads, -1)).flatten(0, 1).flatten(2) for t in tokens)
    y = torch.matmul(linear_attention_context(keys, values), queries * scale)
    return y.reshape(len(v), v.shape[1], *q.shape[2:])


def linear_attention_context(k: Tensor, v: Tensor) -> Tensor:
    """The matrix v softmax(k)^T of each sample, softmax over the places: linear attention without its queries.

    k [B, K, *], v [B, V, *] with the same places; fp32, bf16, fp16 or fp64, both of one dtype. K and V >= 1. Returns
    [B, V, K] of that dtype: element (i, j) is the mean of v's channel i over the places, weighted by the softmax of
    k's channel j. Without places it is zero. -inf in k leaves a place out; NaN where all of a channel are -inf.
    One pass over k and v in any number of places: maxima, sums and products go together, and the softmax is never
    stored. Arithmetic in fp32 (fp64 for fp64; Triton on a GPU multiplies as torch.matmul does, in TF32 where that is
    allowed, and never coarser than fp16 for fp16), rounded once. Channels or places may be next to each other in
    memory, and k and v parts of one tensor; other layouts are copied.

    Gradients flow to k and v; backward is one pass, too, and keeps besides k, v and the result two numbers for each
    channel of k. Sums have a fixed order: the same bits in every run, and on the CPU for any number of threads. There
    are neither gradients of gradients nor forward-mode derivatives (RuntimeError).

    Raises ValueError for shapes, TypeError for dtypes and devices, BackendError for a forced backend.

    Source: Shen et al., "Efficient Attention: Attention with Linear Complexities" (WACV 2021); maxima and sums in one
    pass: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    _checked("linear_attention_context", k, v)
    return torch.ops.lic_fast.linear_attention_context(k, v)[0].to(k.dtype)


def _checked(f: str, k: Tensor, v: Tensor) -> None:
    for name, value in (("k", k), ("v", v)):
        _check.tensor(f, name, value)
    _check.no_forward_mode(f)
    if k.dim() < 2 or k.shape[1] == 0:
        raise ValueError(f"{f}: k must be [B, K, *] with K >= 1, got {list(k.shape)}")
    if v.dim() != k.dim() or v.shape[1] == 0 or (len(v), *v.shape[2:]) != (len(k), *k.shape[2:]):
        shapes = f"{list(v.shape)} and {list(k.shape)}"
        raise ValueError(f"{f}: v must be [B, V, *] with V >= 1 and k's places, got {shapes}")
    _check.dtype_in(f, "k", k, FLOATS)
    if v.dtype != k.dtype:
        raise TypeError(f"{f}: k and v must have one dtype, got {k.dtype} and {v.dtype}; convert one with .to()")
    _check.same_device(f, ("k", k), ("v", v))

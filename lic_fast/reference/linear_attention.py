"""What linear attention makes of keys and values, softmax over the places, and its gradients, as specified."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """[B, C, *] as [B, C, N], in the dtype of the arithmetic."""
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return flat.to(torch.promote_types(x.dtype, torch.float32))


def linear_attention_context(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over places of v softmax(k)^T [B, V, K]; statistics [B, 2, K]), fp32 or fp64 for fp64.

    k [B, K, *], v [B, V, *]; softmax over all places of a channel. statistics: the maximum of each channel of k,
    passing over NaN, or 0 where it is -inf; and the sum of exp(k - that). Not the logarithm of the sum of exp(k): all
    shares of a channel would have its rounding. Without places all are 0.
    """
    keys, values = _wide(k), _wide(v)
    if keys.shape[2] == 0:
        return values.new_zeros(len(k), v.shape[1], k.shape[1]), keys.new_zeros(len(k), 2, k.shape[1])
    most = keys.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(2)
    most = most.where(most != -torch.inf, 0)
    total = torch.exp(keys - most[:, :, None]).sum(2)
    return values @ keys.softmax(2).transpose(1, 2), torch.stack([most, total], 1)


def linear_attention_context_bwd(
    grad: Tensor, k: Tensor, v: Tensor, inner: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """(d k, d v) for the gradient [B, V, K] of the context; inner [B, K]: sum over V of grad times context."""
    keys, values = _wide(k), _wide(v)
    most, total = statistics[:, :, :, None].unbind(1)
    share = torch.exp(keys - most) / total
    d_v = grad @ share
    d_k = share * (grad.transpose(1, 2) @ values - inner[:, :, None])
    return d_k.to(k.dtype).reshape(k.shape), d_v.to(v.dtype).reshape(v.shape)

"""The authors' checkpoints: every tensor of theirs has one place in CDC."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("compressai")

from lic_fast.codec import CDC
from lic_fast.codec._cdc_network import Sizes

SMALL = Sizes(width=8, levels=(1, 2, 2, 2, 2), map_channels=4)


def made(seed: int) -> CDC:
    torch.manual_seed(seed)
    return CDC(sizes=SMALL)


def official(codec: CDC) -> dict[str, torch.Tensor]:
    """The state dict that the authors' code would have for the weights of `codec`; written out by hand."""
    block = {"conv1": "block1.block.0", "norm1": "block1.block.1", "conv2": "block2.block.0", "norm2": "block2.block.1"}
    block |= {"time": "mlp.1", "skip": "res_conv"}
    attention = {"norm": "fn.norm", "qkv": "fn.fn.to_qkv", "out": "fn.fn.to_out"}
    levels = {"block1": (0, block), "block2": (1, block), "attention": (2, attention), "resample": (3, {"": "conv"})}
    state = {}
    for name, value in codec.named_parameters():
        room, *path, leaf = name.split(".")
        if path and "norm" in path[-1]:
            leaf, value = leaf[0].replace("w", "g"), value.view(1, -1, 1, 1)
        if room == "denoiser":
            if path[0] in ("down", "up"):
                number, inner = levels[path[2]]
                middle = inner[path[3] if len(path) > 3 else ""]
                key = f"denoise_fn.{path[0]}s.{path[1]}.{number}.{middle}"
            else:
                heads = {"embed1": "time_mlp.0", "embed2": "time_mlp.2", "norm": "final_conv.0", "out": "final_conv.1"}
                tops = {"middle1": "mid_block1", "middle2": "mid_block2", "middle_attention": "mid_attn"}
                inner = attention if path[0] == "middle_attention" else block
                key = "denoise_fn." + (heads.get(path[0]) or f"{tops[path[0]]}.{inner[path[1]]}")
        elif room == "content" and path[0].startswith("hyper"):
            key = f"context_fn.{path[0].replace('analysis', 'enc').replace('synthesis', 'dec')}.{path[1]}.0"
        elif room == "content":
            side = "enc" if path[0] == "analysis" else "dec"
            key = f"context_fn.{side}.{path[1]}." + (f"0.{block[path[3]]}" if path[2] == "block" else "1.conv")
        elif path and path[0] in ("matrices", "biases", "factors"):
            number, value = leaf, value.transpose(1, 2)[:, None, None]
            kind = {"matrices": f"affine.{number}.weight", "biases": f"affine.{number}.bias", "factors": f"a.{number}"}
            state[f"context_fn.prior.{kind[path[0]]}"] = value
            continue
        else:
            continue
        state[f"{key}.{leaf}"] = value
    medians = codec.entropy_bottleneck.quantiles[:, 0, 1].view(1, -1, 1, 1)
    state |= {f"train_{name}": torch.rand(8193) for name in ("betas", "snr", "sqrt_alphas_cumprod")}
    state["context_fn.prior._medians"] = medians
    return {name: value.detach().clone() for name, value in state.items()}


def test_the_authors_weights_have_a_place_each() -> None:
    theirs = made(seed=0)
    with torch.no_grad():
        theirs.entropy_bottleneck.quantiles[:, 0, 1] = 0.3 * torch.randn(32)
    state, ours = official(theirs), made(seed=1)
    ema = {f"ema_model.{name}": value for name, value in state.items()}
    ema |= {f"online_model.{name}": torch.zeros_like(value) for name, value in state.items()}
    for given in (state, ema | {"initted": torch.tensor(True), "step": torch.tensor(3)}):
        fresh = copy.deepcopy(ours)
        fresh.load_official_state_dict(given)
        wanted, found = dict(theirs.named_parameters()), dict(fresh.named_parameters())
        assert all(torch.equal(found[name], wanted[name]) for name in wanted if not name.endswith("quantiles"))
        quantiles = fresh.entropy_bottleneck.quantiles
        assert torch.equal(quantiles[:, :, 1], theirs.entropy_bottleneck.quantiles[:, :, 1])
        assert (quantiles[:, 0, 0] < quantiles[:, 0, 2]).all() and quantiles.abs().max() > 5
    for change, error, message in (
        ({"context_fn.new.weight": torch.ones(1)}, ValueError, "unknown name, got 'new.weight'"),
        ({"other": torch.ones(1)}, ValueError, "unknown name, got 'other'"),
        ({"denoise_fn.ups.9.0.mlp.1.bias": torch.ones(1)}, RuntimeError, "0 weights are missing and 1 have no place"),
    ):
        with pytest.raises(error, match=message):
            ours.load_official_state_dict(state | change)
    first = next(name for name in state if name.startswith("denoise_fn"))
    with pytest.raises(RuntimeError, match="1 weights are missing and 0"):
        ours.load_official_state_dict({name: value for name, value in state.items() if name != first})
    with pytest.raises(ValueError, match="no medians"):
        ours.load_official_state_dict({})

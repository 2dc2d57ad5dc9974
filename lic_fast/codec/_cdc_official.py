"""The names of the authors' published checkpoints, and ours (docs/CDC.md).

Their models are two modules, context_fn and denoise_fn, whose layers are numbered; the released files hold them as
"model", or as "ema" with a prefix. Every tensor of the two has one place here; what is left of a file is the noise
schedule, and the weights of the perceptual loss, neither of which belongs to the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIXES = ("ema_model.", "module.")
_LEFT_OUT = re.compile(r"(train_\w+|initted|step|loss_fn_vgg\..*|online_model\..*|.*_offset)")
_NORM = {"g": "weight", "b": "bias"}


def _block(rest: str) -> str:
    """A residual block's: block1.block.0 is a convolution, block1.block.1 its norm."""
    found = re.fullmatch(r"block([12])\.block\.(0|1)\.(\w+)", rest)
    if found:
        half, kind, leaf = found.groups()
        return f"conv{half}.{leaf}" if kind == "0" else f"norm{half}.{_NORM[leaf]}"
    return rest.replace("mlp.1.", "time.").replace("res_conv.", "skip.")


def _attention(rest: str) -> str:
    found = re.fullmatch(r"fn\.norm\.(g|b)", rest)
    return (
        f"norm.{_NORM[found[1]]}" if found else rest.replace("fn.fn.to_qkv.", "qkv.").replace("fn.fn.to_out.", "out.")
    )


_PARTS = ("block1", "block2", "attention", "resample")


def _denoiser(name: str) -> str:
    found = re.fullmatch(r"(downs|ups)\.(\d+)\.(\d)\.(.*)", name)
    if found:
        side, level, part, rest = found.groups()
        kind = _PARTS[int(part)]
        place = f"{side.removesuffix('s')}.{level}.{kind}."
        if kind == "resample":
            return place + rest.removeprefix("conv.")
        return place + (_attention(rest) if kind == "attention" else _block(rest))
    found = re.fullmatch(r"final_conv\.(0|1)\.(\w+)", name)
    if found:
        return f"norm.{_NORM[found[2]]}" if found[1] == "0" else f"out.{found[2]}"
    head, _, rest = name.partition(".")
    if head == "time_mlp":
        return rest.replace("0.", "embed1.", 1) if rest.startswith("0.") else rest.replace("2.", "embed2.", 1)
    if head == "mid_attn":
        return "middle_attention." + _attention(rest)
    return head.replace("mid_block", "middle") + "." + _block(rest)


def _content(name: str) -> str:
    found = re.fullmatch(r"(enc|dec)\.(\d+)\.(\d)\.(.*)", name)
    if found:
        side, stage, part, rest = found.groups()
        room, other = ("analysis", "down") if side == "enc" else ("synthesis", "up")
        if part == "0":
            return f"{room}.{stage}.block.{_block(rest)}"
        return f"{room}.{stage}.{other}.{rest.removeprefix('conv.')}"
    found = re.fullmatch(r"hyper_(enc|dec)\.(\d+)\.0\.(\w+)", name)
    if found:
        return f"hyper_{'analysis' if found[1] == 'enc' else 'synthesis'}.{found[2]}.{found[3]}"
    raise ValueError(f"CDC.load_official_state_dict: unknown name, got {name!r}; pass the state dict of a CDC model")


def _prior(name: str, value: Tensor) -> tuple[str, Tensor]:
    """The factorized prior's, shaped as CompressAI's EntropyBottleneck has them."""
    affine = re.fullmatch(r"affine\.(\d)\.(weight|bias)", name)
    if affine:
        kind = "matrices" if affine[2] == "weight" else "biases"
        return f"entropy_bottleneck.{kind}.{affine[1]}", value[:, 0, 0].transpose(1, 2)
    return f"entropy_bottleneck.factors.{name.rpartition('.')[2]}", value[:, 0, 0].transpose(1, 2)


def converted(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """(ours by name, without tables and quantiles; the medians [Z] of the hyperlatent's prior).

    state: a published file's "ema" or "model". Raises ValueError for names it does not know or that are missing.
    """
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    ours: dict[str, Tensor] = {}
    medians = None
    for name, value in state.items():
        room, _, rest = name.partition(".")
        if room == "denoise_fn":
            ours[f"denoiser.{_denoiser(rest)}"] = value
        elif room == "context_fn" and rest == "prior._medians":
            medians = value.reshape(-1)
        elif room == "context_fn" and rest.startswith("prior."):
            place, tensor = _prior(rest.removeprefix("prior."), value)
            ours[place] = tensor
        elif room == "context_fn":
            ours[f"content.{_content(rest)}"] = value
        elif not _LEFT_OUT.fullmatch(name):
            raise ValueError(f"CDC.load_official_state_dict: unknown name, got {name!r}; pass the dict of a CDC model")
    if medians is None:
        raise ValueError(
            "CDC.load_official_state_dict: no medians of the prior, got another dict; pass 'ema' or 'model'"
        )
    return {name: _shaped(name, value.detach()) for name, value in ours.items()}, medians.detach()


def _shaped(name: str, value: Tensor) -> Tensor:
    """Theirs has norms' weights as [1, C, 1, 1], ours as [C]."""
    shaped = value.reshape(-1) if re.search(r"norm\d?\.(weight|bias)$", name) else value
    return shaped.clone(memory_format=torch.contiguous_format)

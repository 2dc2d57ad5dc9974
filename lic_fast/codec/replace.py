"""replace_context_model: MSP in the place of the hyperprior or the context model of a trained image model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._transforms import DOWNSAMPLING
from .msp import MSPCodec

_SIDE = 128  # of the picture that is tried: whole blocks for any hyperprior, and for windows of attention


def replace_context_model(model: nn.Module, profile: object = "base", *, mixture: int = 1) -> MSPCodec:
    """An MSPCodec between the analysis `model.g_a` and the synthesis `model.g_s` of an image model.

    model: [B, 3, H, W] -> g_a -> latent [B, M, H / 16, W / 16] -> a probability model -> g_s, as CompressAI's
    bmshj2018-*, mbt2018*, cheng2020-*, elic2022-*, or a class of your own: one picture is passed through it to see that
    this is what it does. profile, mixture: as in MSPEntropyModel.

    The transforms are the model's own modules with their weights, not copies, on their device and in their mode;
    whatever else the model has (h_a, h_s, context, entropy models) is left behind, and `model` stays usable. The
    entropy model is new and untrained: train it, with the transforms or with
    `codec.g_a.requires_grad_(False); codec.g_s.requires_grad_(False)`, then call update().

    Raises TypeError for what is no model with g_a and g_s, and for dtypes other than fp32; ValueError where the picture
    does not pass through g_a and g_s as said (variable-rate and video models, other downsampling), and for the profile.
    """
    kind = type(model).__name__
    parts = [getattr(model, name, None) for name in ("g_a", "g_s")]
    if not isinstance(model, nn.Module) or not all(isinstance(part, nn.Module) for part in parts):
        raise TypeError(
            f"replace_context_model: model must have an analysis g_a and a synthesis g_s, got {kind}; "
            "give one of CompressAI's image models, not a wrapper"
        )
    tensor = next(model.g_a.parameters(), None)
    if tensor is None or tensor.dtype is not torch.float32:
        raise TypeError(
            f"replace_context_model: g_a must have fp32 weights, got {'none' if tensor is None else tensor.dtype} in "
            f"{kind}; convert it with .float()"
        )
    if hasattr(model, "Gain"):
        raise ValueError(
            f"replace_context_model: {kind} scales its latent by a gain for each rate, which MSP does not know; "
            "give a model of one rate"
        )
    picture = torch.linspace(0, 1, 3 * _SIDE**2, device=tensor.device).view(1, 3, _SIDE, _SIDE)
    channels = _latent_channels(model, picture)
    codec = MSPCodec.around(model.g_a, model.g_s, channels, profile=profile, mixture=mixture)
    codec.entropy_model.to(tensor.device)
    codec.entropy_model.train(model.training)
    codec.training = model.training
    return codec


def _latent_channels(model: nn.Module, x: Tensor) -> int:
    """M, once x has passed through g_a once, and through g_s once at the end."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"g_a": [], "g_s": []}
    hooks = [
        getattr(model, name).register_forward_hook(
            lambda _, inputs, output, calls=calls: calls.append((*inputs, output))
        )
        for name, calls in seen.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    kind = type(model).__name__
    try:
        with torch.no_grad():
            output = model.eval()(x)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"replace_context_model: {kind} does not take a picture {list(x.shape)}: {lines[0][:200]}; "
            "give an image model"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    reason = _complaint(seen, x, output)
    if reason is not None:
        raise ValueError(f"replace_context_model: {kind} is no g_a, probability model, g_s: {reason}; give one that is")
    return seen["g_a"][0][1].shape[1]


def _complaint(seen: dict[str, list[tuple[Tensor, ...]]], x: Tensor, output: object) -> str | None:
    calls = {name: len(found) for name, found in seen.items()}
    if calls != {"g_a": 1, "g_s": 1} or any(len(found[0]) != 2 for found in seen.values()):
        return f"g_a was called {calls['g_a']} times and g_s {calls['g_s']} times, or with further arguments"
    (image, y), (y_hat, x_hat) = seen["g_a"][0], seen["g_s"][0]
    side = _SIDE // DOWNSAMPLING
    if not isinstance(y, Tensor) or y.dim() != 4 or y.shape[2:] != (side, side):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        return f"the latent of {list(x.shape)} is {got}, not [1, M, {side}, {side}]"
    if image is not x or y_hat.shape != y.shape:
        return "what g_s takes is not what g_a gave, quantised"
    shown = output.get("x_hat") if isinstance(output, dict) else None
    if not isinstance(shown, Tensor) or not any(torch.equal(shown, same) for same in (x_hat, x_hat.clamp(0, 1))):
        return 'its output "x_hat" is not what g_s gave'
    if shown.shape != x.shape:
        return f"{list(x.shape)} comes back as {list(shown.shape)}"
    return None

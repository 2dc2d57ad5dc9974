"""The models of the study of MSP: one analysis, one synthesis, four probability models of the latent between them."""

from __future__ import annotations

import math

from compressai.entropy_models import EntropyBottleneck
from compressai.latent_codecs import (
    CheckerboardLatentCodec,
    GaussianConditionalLatentCodec,
    HyperLatentCodec,
    HyperpriorLatentCodec,
)
from compressai.layers import CheckerboardMaskedConv2d
from compressai.models.base import SimpleVAECompressionModel
from compressai.models.google import JointAutoregressiveHierarchicalPriors
from compressai.registry import MODELS, register_model
from torch import nn

from ..training import models as _models

MSP, HYPERPRIOR, CHECKERBOARD, AUTOREGRESSIVE = "msp-base", "mbt2018-mean", "mbt2018-checkerboard", "mbt2018"
NAMES = (MSP, HYPERPRIOR, CHECKERBOARD, AUTOREGRESSIVE)


class LightCheckerboard(SimpleVAECompressionModel):
    """mbt2018 with CompressAI's checkerboard context (He et al., CVPR 2021) in the place of the raster scan.

    Transforms, hyperprior and the sizes of all networks are mbt2018's; the masked convolution alone is another.
    CompressAI has this combination for the transforms of cheng2020 only.
    """

    def __init__(self, N: int = 192, M: int = 192, **kwargs: object) -> None:
        super().__init__(**kwargs)
        like = JointAutoregressiveHierarchicalPriors(N, M)
        self.g_a, self.g_s = like.g_a, like.g_s
        context = CheckerboardLatentCodec(
            latent_codec={"y": GaussianConditionalLatentCodec(quantizer="ste")},
            entropy_parameters=like.entropy_parameters,
            context_prediction=CheckerboardMaskedConv2d(M, 2 * M, kernel_size=5, stride=1, padding=2),
        )
        hyper = HyperLatentCodec(EntropyBottleneck(N), h_a=like.h_a, h_s=like.h_s, quantizer="ste")
        self.latent_codec = HyperpriorLatentCodec(latent_codec={"y": context, "hyper": hyper})


def register() -> None:
    """Makes LightCheckerboard known to CompressAI's registry, and so to the training loop and to checkpoints."""
    if CHECKERBOARD not in MODELS:
        register_model(CHECKERBOARD)(LightCheckerboard)
        _models._registered.cache_clear()


def decode_steps(name: str, height: int, width: int) -> int:
    """Sequential steps in which the latent of an image of so many pixels is decoded, the hyperprior's one included."""
    h, w = (64 * math.ceil(side / 64) // 16 for side in (height, width))
    return {MSP: 19, HYPERPRIOR: 1 + 1, CHECKERBOARD: 1 + 2, AUTOREGRESSIVE: 1 + h * w}[name]


def sized(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those outside of g_a and g_s)."""
    transforms = sum(p.numel() for part in (model.g_a, model.g_s) for p in part.parameters())
    whole = sum(p.numel() for p in model.parameters())
    return whole, whole - transforms

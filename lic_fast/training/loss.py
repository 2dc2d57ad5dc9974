"""The rate-distortion loss of learned image compression."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RateDistortionLoss(nn.Module):
    """lmbda * 255**2 * D + bpp, with bpp = sum over all latents of -log2(likelihood) / pixels.

    D is the MSE, unless the model has a distortion of its own.

    forward(output, target, aux): output as CompressAI's models give it (x_hat [B, 3, H, W], likelihoods: a
    dict of tensors of any shape; a model with a distortion of its own adds "distortion", a scalar in the scale
    of squared errors of images in [-1, 1], which is 4 times that of [0, 1]), target [B, 3, H, W] in [0, 1]; aux
    a scalar that is passed through. All fp32. Returns scalars: loss, bpp (bits a pixel), distortion (the other
    term), mse (of [0, 1] values), psnr (dB), aux. Source: Balle et al. 2018, eq. 4-5, with the scaling of the
    distortion that CompressAI's lambdas assume.
    """

    def __init__(self, lmbda: float) -> None:
        super().__init__()
        self.lmbda = lmbda

    def forward(self, output: dict, target: Tensor, aux: Tensor) -> dict[str, Tensor]:
        pixels = target.numel() // target.shape[1]
        bits = [-likelihood.float().log2().sum() for likelihood in output["likelihoods"].values()]
        bpp = torch.stack(bits).sum() / pixels
        mse = (output["x_hat"].float() - target).square().mean()
        distortion = self.lmbda * 255**2 * (output["distortion"].float() / 4 if "distortion" in output else mse)
        psnr = -10 * mse.detach().log10()
        return {"loss": distortion + bpp, "bpp": bpp, "distortion": distortion, "mse": mse, "psnr": psnr, "aux": aux}

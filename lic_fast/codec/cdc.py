"""CDC: an image codec whose decoder is a diffusion model, conditioned by what was transmitted (docs/CDC.md)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import q_sample, q_sample_loss
from ..functional.coding import BitstreamError
from . import _cdc_schedule as schedules
from . import _tiles
from ._cdc_graph import Recordings
from ._cdc_network import ContentCodec, Denoiser, Sizes
from ._cdc_official import converted
from ._cdc_sampler import Settings, normal, sampled
from ._cdc_sampler import laid_out as _laid_out

_PAPER = Sizes()
_LIGHT = Sizes(width=32, levels=(1, 2, 3, 4, 4), map_channels=32)
CDC_NAMES: dict[str, dict[str, Any]] = {
    "cdc-x": {"sizes": _PAPER, "predicts": "x"},
    "cdc-x-lpips": {"sizes": _PAPER, "predicts": "x", "rho": 0.9},
    "cdc-eps": {"sizes": Sizes(map_channels=3), "predicts": "eps"},
    "cdc-x-light": {"sizes": _LIGHT, "predicts": "x"},
    "cdc-eps-light": {"sizes": _LIGHT, "predicts": "eps"},
}
"""The names by which `lic-fast train --model` knows these codecs."""

_SCALE_BOUND = 0.1
_SNR_BOUND = 5.0
_TRAINED_STEPS = {"x": 8193, "eps": 20000}


class CDC(nn.Module):
    """Yang and Mandt's conditional diffusion codec: a content latent is transmitted, a sampler paints the image.

    Encoder: residual blocks to a latent y at 1/16, with a mean-scale hyperprior. Decoder: y becomes a map for each of
    four resolutions, and a U-Net that sees them denoises, in a few steps of DDIM, from noise to the image.

    sizes: of the networks. predicts: "x", the U-Net gives the image, trained over 8193 steps of a cosine schedule,
    the squared error weighted by the signal-to-noise ratio up to 5; or "eps", it gives the noise, over 20000 steps of
    a linear one, without weights. rho: weight of the perceptual loss (LPIPS, of the package lpips), beside 1 - rho of
    the other; the paper has 0 and 0.9.

    steps, gamma, eta: how decompress() samples unless compress() was told otherwise: the number of steps (17 for "x",
    200 for "eps", which needs many), the standard deviation of the noise it begins with (the published code's 0.8; 0
    begins with grey), and of DDIM's own noise (0 none, 1 DDPM's). tile, overlap: an image with a longer side is
    sampled in tiles of at most tile pixels a side, of which neighbours share overlap or more, and which are blended
    there; 0 has no limit. So memory is that of a tile, beside the latent and two images. All of these travel in the
    stream with the seed, so that a stream has one decoding; noise is from a counter-based generator, the same bits on
    every device. Networks round otherwise elsewhere: pixels repeat to the bit on one kind of machine and torch, else
    within rounding. progress: wraps the list of steps, e.g. tqdm.tqdm. cuda_graph: on a GPU, from the second image or
    tile of a size on, all steps are one CUDA graph.

    threads: with how many the hyperprior's synthesis runs on the CPU; 1 makes streams independent of
    torch.set_num_threads(), by which convolutions round otherwise. None leaves torch's number.

    Raises ValueError for sizes and settings, ImportError without CompressAI, or for rho > 0 without lpips.
    Source: Yang and Mandt (NeurIPS 2023, arXiv 2209.06950).
    """

    usual_steps: ClassVar[dict[str, int]] = {"x": 17, "eps": 200}
    gamma = 0.8
    eta = 0.0
    tile = 1024
    overlap = 128
    cuda_graph = True
    threads: int | None = 1
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None

    def __init__(self, N: int | None = None, *, sizes: Sizes = _PAPER, predicts: str = "x", rho: float = 0.0) -> None:
        super().__init__()
        from ..entropy import EntropyBottleneck, GaussianConditional  # which import compressai

        if predicts not in _TRAINED_STEPS:
            raise ValueError(f'CDC: predicts must be "x" or "eps", got {predicts!r}')
        if not 0 <= rho < 1:
            raise ValueError(f"CDC: rho must be in [0, 1), got {rho!r}")
        if N is not None:
            maps = sizes.map_channels * N // sizes.width if sizes.map_channels > 3 else sizes.map_channels
            sizes = Sizes(N, sizes.latent, sizes.synthesis, sizes.hyper, sizes.levels, max(1, maps))
        self.sizes, self.predicts, self.rho = sizes, predicts, rho
        self.steps = self.usual_steps[predicts]
        self.content, self.denoiser = ContentCodec(sizes), Denoiser(sizes)
        self.entropy_bottleneck = EntropyBottleneck(self.content.hyper_channels, filters=(3, 3, 3))
        self.gaussian_conditional = GaussianConditional(None, scale_bound=_SCALE_BOUND)
        total = _TRAINED_STEPS[predicts]
        self.abar = schedules.cosine(total) if predicts == "x" else schedules.linear(total)
        signal, noise = self.abar.sqrt(), (1 - self.abar).sqrt()
        ratio = self.abar / (1 - self.abar)
        weight = ratio.clamp(max=_SNR_BOUND) if predicts == "x" else torch.ones_like(ratio)
        self.register_buffer("_table", torch.stack([signal, noise, weight], 1).float(), persistent=False)
        self._recordings = Recordings()
        self._perceptual: list[nn.Module] = []  # in a list: its weights are not the model's
        if rho > 0:
            self._perceptual.append(_lpips())

    @classmethod
    def from_name(cls, name: str, N: int | None = None) -> CDC:
        """The codec that `lic-fast train --model name` trains. Raises ValueError for names not in CDC_NAMES."""
        if name not in CDC_NAMES:
            raise ValueError(f"CDC: unknown name, got {name!r}; use one of {', '.join(CDC_NAMES)}")
        return cls(N, **CDC_NAMES[name])

    @property
    def padding_multiple(self) -> int:
        """What both sides of an image must be multiples of."""
        return self.sizes.multiple

    @property
    def downsampling_factor(self) -> int:
        return self.sizes.multiple

    # Training

    def forward(self, x: Tensor) -> dict[str, Any]:
        """One pass of the networks over x [B, 3, H, W] in [0, 1], as training needs it.

        {"x_hat" [B, 3, H, W]: what one step from the noise predicts, in [0, 1]; "likelihoods": {"y", "z"};
        "distortion": a scalar, (1 - rho) times the weighted squared error of the prediction, in the scale of [-1, 1],
        plus rho times LPIPS}. In training mode times and noise are drawn from torch's generator, and likelihoods are
        those of the latents plus uniform noise, while the maps see them rounded, with the derivative 1. In eval mode
        the latents are rounded, and times and noise are fixed by the shape, so that the figures of two models can be
        compared. What decompress() gives is reconstruct()'s.
        Raises ValueError for the shape.
        """
        image = _laid_out(2 * self._checked("forward", x) - 1)
        y_hat, likelihoods = self._latents(self.content.analyse(image))
        maps = self.content.maps(y_hat)
        times, seed = self._drawn(image)
        signal, spread, weight = self._table[times].to(torch.promote_types(image.dtype, torch.float32)).unbind(1)
        noisy = q_sample(image, signal, spread, seed=seed)
        predicted = self.denoiser(noisy, times[:, None].to(image.dtype) / len(self.abar), maps)
        if self.predicts == "x":
            x0, error = predicted, q_sample_loss(predicted.to(image.dtype), image, weight)
        else:
            error = q_sample_loss(predicted, None, weight, seed=seed)
            signal, spread = (column.to(image.dtype).view(-1, 1, 1, 1) for column in (signal, spread))
            x0 = ((noisy - spread * predicted) / signal).clamp(-1, 1)
        distortion = error
        if self.rho > 0:
            seen = self._perceptual[0].to(x0.device)(x0.float(), image.float()).mean()
            distortion = (1 - self.rho) * error + self.rho * seen
        return {"x_hat": (x0 + 1) / 2, "likelihoods": likelihoods, "distortion": distortion}

    def _drawn(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(times [B] int64, the noise's seed [1] int64)."""
        count, device = len(image), image.device
        if self.training:
            return torch.randint(len(self.abar), (count,), device=device), torch.randint(1 << 62, (1,), device=device)
        times = (torch.arange(count, device=device) * 2 + 1) * len(self.abar) // (2 * count)
        return times, torch.zeros(1, dtype=torch.int64, device=device)

    def _latents(self, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(y_hat as the decoder has it, with the derivative 1 in y; {"y", "z": likelihoods})."""
        z = self.content.hyper_analyse(y)
        _, of_z = self.entropy_bottleneck(z)
        medians = self.entropy_bottleneck.quantiles[:, 0, 1].detach().view(-1, 1, 1)
        means, scales = self._density(_rounded(z, medians))
        _, of_y = self.gaussian_conditional(y, scales, means)
        return _rounded(y, means.detach()), {"y": of_y, "z": of_z}

    def _density(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        from ..entropy._threads import number_of_threads

        own = self.threads is not None and z_hat.device.type == "cpu" and not self.training
        with number_of_threads(self.threads) if own else contextlib.nullcontext():
            return self.content.parameters_of(z_hat.contiguous())  # as a decoder has it: other layouts round otherwise

    def aux_loss(self) -> Tensor:
        """The auxiliary loss of the entropy bottleneck's quantiles."""
        return self.entropy_bottleneck.loss()

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        y_hat: Tensor,
        *,
        seed: int = 0,
        steps: int | None = None,
        gamma: float | None = None,
        eta: float | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """The image [B, 3, 16 h, 16 w] in [-1, 1], not clamped, of y_hat [B, M, h, w], in `steps` passes of the U-Net.

        Every sample gets the noise that it gets alone. Raises ValueError for settings.
        """
        return sampled(self, y_hat, self._settings("sample", seed, steps, gamma, eta, tile, overlap))

    @staticmethod
    def _noise(like: Tensor, seed: int, key: int, amount: float) -> Tensor:
        """Normal noise, sample by sample the same; of the generator whose key is seed, and key in its upper half."""
        return normal(like, seed | key << 32, amount).expand(like.shape)

    def check_settings(self, function: str, **settings: Any) -> None:
        """Raises ValueError where settings, of sample(), are out of range; function is whose error it is."""
        self._settings(function, settings.get("seed", 0), *map(settings.get, Settings._fields[1:]))

    def _settings(self, function: str, seed: int, *given: float | None) -> Settings:
        """given: steps, gamma, eta, tile, overlap; None is the model's own. Raises ValueError."""
        grid = self.sizes.multiple
        own = (self.steps, self.gamma, self.eta, self.tile, -(-self.overlap // grid) * grid)
        chosen = [mine if value is None else value for mine, value in zip(own, given, strict=True)]
        return Settings(seed, *chosen).check(function, len(self.abar), grid)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        seed: int = 0,
        steps: int | None = None,
        gamma: float | None = None,
        eta: float | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> dict[str, Any]:
        """{"x_hat", "likelihoods"} of x [B, 3, H, W] in [0, 1] without a stream: what decompress() gives, and its rate.

        The model must be in eval mode. Raises what sample() and forward() raise.
        """
        if self.training:
            raise ValueError("CDC.reconstruct: the model is in training mode, got latents with noise; call .eval()")
        settings = self._settings("reconstruct", seed, steps, gamma, eta, tile, overlap).as_decoded()
        y_hat, likelihoods = self._latents(self._analysed(2 * self._checked("reconstruct", x) - 1, settings.tile))
        images = [sampled(self, each[None], settings) for each in y_hat]
        return {"x_hat": _as_image(torch.cat(images)), "likelihoods": likelihoods}

    def _analysed(self, image: Tensor, tile: int) -> Tensor:
        """The latent of an image in [-1, 1], in tiles of this side that see beyond their borders; 0 is no limit."""
        factor = self.sizes.downsampling
        if not tile:
            return self.content.analyse(image)
        return _tiles.analyse(self.content.analysis, image, factor, tile // factor)

    # Streams

    def update(self, scale_table: object = None, force: bool = False) -> bool:
        """Makes the hyperlatent's coding tables, where there are none or by force; returns whether it did.

        scale_table is CompressAI's argument, of no meaning here: the latent is coded with constant tables.
        """
        return self.entropy_bottleneck.update(force=force)

    @torch.no_grad()
    def compress(
        self,
        x: Tensor,
        *,
        seed: int = 0,
        steps: int | None = None,
        gamma: float | None = None,
        eta: float | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> dict[str, Any]:
        """{"strings": [[bytes of y], [of z], [of the sampler's settings]], "shape": (h, w) of z}, a sample an entry.

        x [B, 3, H, W] in [0, 1]. seed and the others: with which every sample is to be decoded; by default 0 and the
        model's own. Raises what forward() and sample() raise, and ValueError for latents that are not finite.
        """
        settings = self._settings("compress", seed, steps, gamma, eta, tile, overlap)
        streams: list[list[bytes]] = [[], [], []]
        shape: torch.Size | None = None
        for image in 2 * self._checked("compress", x) - 1:
            y = self._analysed(image[None], settings.tile)
            if not bool(y.isfinite().all()):
                raise ValueError("CDC.compress: the latent is not finite; look at the image and the weights")
            z = self.content.hyper_analyse(y)
            shape = z.shape[2:]
            coded = self.entropy_bottleneck.compress(z, format="lic_fast")
            means, scales = self._density(self._hyperlatent(coded, shape))
            streams[0] += self.gaussian_conditional.compress(y, scales, means, format="lic_fast")
            streams[1] += coded
            streams[2].append(settings.packed())
        return {"strings": streams, "shape": shape}

    def _hyperlatent(self, strings: Sequence[bytes], shape: Sequence[int]) -> Tensor:
        return self.entropy_bottleneck.decompress(list(strings), tuple(shape), format="lic_fast")

    @torch.no_grad()
    def latents(self, strings: Sequence[Sequence[bytes]], shape: Sequence[int]) -> list[Tensor]:
        """y_hat [1, M, h, w] of each sample of what compress() gave: the part of decoding that is exact.

        Raises BitstreamError for strings of another form, and for streams that are damaged or of another shape.
        """
        if len(strings) != 3 or len({len(part) for part in strings}) != 1:
            raise BitstreamError(f"CDC.decompress: strings must be three lists of bytes, got {len(strings)} entries")
        found = []
        for of_y, of_z in zip(strings[0], strings[1], strict=True):
            means, scales = self._density(self._hyperlatent([of_z], shape))
            found.append(self.gaussian_conditional.decompress([of_y], scales, means=means, format="lic_fast"))
        return found

    @torch.no_grad()
    def decompress(self, strings: Sequence[Sequence[bytes]], shape: Sequence[int]) -> dict[str, Tensor]:
        """{"x_hat" [B, 3, H, W] in [0, 1]} of what compress() gave, sampled as the streams say, one after another.

        Raises what latents() raises, and BitstreamError for settings that no encoder writes.
        """
        settings = self.settings_of(strings)
        found = self.latents(strings, shape)
        return {"x_hat": _as_image(torch.cat([sampled(self, *each) for each in zip(found, settings, strict=True)]))}

    def settings_of(self, strings: Sequence[Sequence[bytes]]) -> list[Settings]:
        """(seed, steps, gamma, eta, tile, overlap) of each sample of what compress() gave. Raises BitstreamError."""
        if len(strings) != 3:
            raise BitstreamError(f"CDC.decompress: strings must be three lists of bytes, got {len(strings)} entries")
        found = [Settings.unpacked(header) for header in strings[2]]
        try:
            return [each.check("decompress", len(self.abar), self.sizes.multiple) for each in found]
        except ValueError as error:
            raise BitstreamError(f"{error}; the stream is damaged") from error

    # Weights of others

    def load_official_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights of the authors' published checkpoints (MIT): a file's "ema" or "model" dict.

        The sizes must be those of "cdc-x" or "cdc-eps". Every tensor of theirs has one place here
        (codec/_cdc_official.py); the tails of the prior, which theirs does not have, are solved for. Raises ValueError
        for unknown names and RuntimeError for missing ones or other sizes.
        """
        weights, medians = converted(state)
        own = {name for name, _ in self.named_parameters()} - {"entropy_bottleneck.quantiles"}
        if weights.keys() != own:
            missing, extra = sorted(own - weights.keys()), sorted(weights.keys() - own)
            raise RuntimeError(
                f"CDC.load_official_state_dict: {len(missing)} weights are missing and {len(extra)} have no place, "
                f"for example {(missing + extra)[0]}; make the model with the sizes of the checkpoint"
            )
        self.load_state_dict(weights, strict=False)
        with torch.no_grad():
            self.entropy_bottleneck.solve_quantiles()
            self.entropy_bottleneck.quantiles[:, 0, 1] = medians.to(self.entropy_bottleneck.quantiles)

    def _checked(self, function: str, x: Tensor) -> Tensor:
        multiple = self.sizes.multiple
        if x.dim() != 4 or x.shape[1] != 3 or any(side == 0 or side % multiple for side in x.shape[2:]):
            raise ValueError(
                f"CDC.{function}: x must be [B, 3, H, W], H and W multiples of {multiple}, got {list(x.shape)}; pad it"
            )
        return x


def _rounded(values: Tensor, centre: Tensor) -> Tensor:
    """values rounded about centre, with the derivative 1."""
    rounded = (torch.round(values - centre) + centre).detach()
    return rounded + (values - values.detach()) if values.requires_grad else rounded


def _as_image(x: Tensor) -> Tensor:
    return ((x + 1) / 2).clamp(0, 1)


def _lpips() -> nn.Module:
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise ImportError(
            "CDC: the perceptual loss needs lpips, which is not installed; run: pip install lic_fast[perceptual]"
        ) from error
    return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()

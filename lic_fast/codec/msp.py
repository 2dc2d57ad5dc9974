"""A complete image model around MSPEntropyModel: what CompressAI's models take and return (docs/MSP.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..functional.coding import BitstreamError
from . import _tiles
from ._transforms import DOWNSAMPLING, TRANSFORMS

_PROFILES = ("fast", "base", "max")
MSP_NAMES = {
    f"msp-{profile}{suffix}": {"profile": profile, "transforms": transforms}
    for suffix, transforms in (("", "light"), ("-elic", "elic"))
    for profile in _PROFILES
}
"""The names by which `lic-fast train --model` knows these codecs."""


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """What MSPCodec makes of y_hat; equal where the module and the tiles are the same."""

    g_s: nn.Module
    tile: int | None

    def __call__(self, y_hat: Tensor) -> Tensor:
        return self.of(y_hat).clamp_(0, 1)

    def of(self, y_hat: Tensor) -> Tensor:
        if self.tile is None:
            return self.g_s(y_hat)
        return _tiles.synthesise(self.g_s, y_hat, DOWNSAMPLING, self.tile)

    def modules(self) -> Iterator[nn.Module]:
        return self.g_s.modules()


class MSPCodec(nn.Module):
    """Analysis, MSPEntropyModel without a hyperprior, synthesis.

    N, M: channels of the transforms and of the latent. profile: "fast", "base", "max", or a lic_fast.entropy.Profile.
    transforms: "light" (those of CompressAI's mbt2018) or "elic". mixture: as in MSPEntropyModel.
    The layers are CompressAI's, which must be installed.

    Without gradients, images of more than `tile` latents a side (default 96, 1536 pixels) go through the transforms a
    tile at a time, with so much about each that the result is the same up to rounding; None never does. A decoder needs
    the encoder's `tile` to come to the same pixels.

    On a GPU decompress() of one image is, from the second image of a shape on, one CUDA graph, from bytes to pixels
    (entropy_model.cuda_graph).

    Raises ValueError for profiles, transforms and sizes, ImportError without CompressAI.
    Source: Zhang et al. (arXiv 2210.04112) for the probability model, reconstructed; the transforms are as said.
    """

    tile: int | None = _tiles.TILE
    downsampling_factor = DOWNSAMPLING
    padding_multiple = (
        DOWNSAMPLING  # any latent has a schedule: images need no more padding than the transforms ask for
    )

    _own_transforms = True

    def __init__(
        self, N: int = 128, M: int = 192, *, profile: object = "base", transforms: str = "light", mixture: int = 1
    ) -> None:
        super().__init__()
        from ..entropy import MSPEntropyModel  # which imports compressai

        if transforms not in TRANSFORMS:
            raise ValueError(f"MSPCodec: transforms must be one of {', '.join(TRANSFORMS)}, got {transforms!r}")
        self.g_a, self.g_s = TRANSFORMS[transforms](N, M)
        self.entropy_model = MSPEntropyModel(M, profile, mixture=mixture)

    @classmethod
    def from_name(cls, name: str, N: int = 128, M: int = 192) -> MSPCodec:
        """The codec that `lic-fast train --model name` trains. Raises ValueError for names not in MSP_NAMES."""
        if name not in MSP_NAMES:
            raise ValueError(f"MSPCodec: unknown name, got {name!r}; use one of {', '.join(MSP_NAMES)}")
        return cls(N, M, **MSP_NAMES[name])

    @classmethod
    def around(
        cls, g_a: nn.Module, g_s: nn.Module, channels: int, *, profile: object = "base", mixture: int = 1
    ) -> MSPCodec:
        """The codec of these very modules: g_a [B, 3, 16 h, 16 w] -> [B, channels, h, w], g_s back; not copied.

        The entropy model is new, with random weights, and on the CPU. Raises ValueError for the profile and mixture.
        """
        from ..entropy import MSPEntropyModel

        codec = cls.__new__(cls)
        nn.Module.__init__(codec)
        codec.g_a, codec.g_s = g_a, g_s
        codec.tile = None  # how far these modules look is not known
        codec._own_transforms = False
        codec.entropy_model = MSPEntropyModel(channels, profile, mixture=mixture)
        return codec

    def forward(self, x: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        """{"x_hat" [B, 3, H, W], "likelihoods": {"y" [B, M, H / 16, W / 16]}} of x [B, 3, H, W] in [0, 1].

        In training mode by noise and straight-through rounding (MSPEntropyModel.forward), else exactly what
        decompress() gives, up to what a batch or a clamp to [0, 1] changes.
        Raises ValueError where H or W is not a positive multiple of 16.
        """
        return self.decoded(self._analysis(self._checked("forward", x)))

    def decoded(self, y: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        """forward() from the latent y [B, M, h, w] on. Raises ValueError for the shape."""
        y_hat, likelihoods = self.entropy_model(y)
        return {"x_hat": self._synthesis(y_hat), "likelihoods": {"y": likelihoods}}

    def _analysis(self, x: Tensor) -> Tensor:
        if self.tile is None or torch.is_grad_enabled():
            return self.g_a(x)
        return _tiles.analyse(self.g_a, x, DOWNSAMPLING, self.tile)

    def _synthesis(self, y_hat: Tensor) -> Tensor:
        return _Pixels(self.g_s, None if torch.is_grad_enabled() else self.tile).of(y_hat)

    def _checked(self, function: str, x: Tensor) -> Tensor:
        sides = x.shape[2:]
        if x.dim() != 4 or x.shape[1] != 3 or any(side == 0 or side % DOWNSAMPLING for side in sides):
            raise ValueError(
                f"MSPCodec.{function}: x must be [B, 3, H, W], H and W multiples of {DOWNSAMPLING}, got "
                f"{list(x.shape)}; pad it"
            )
        return x

    def aux_loss(self) -> Tensor:
        """The auxiliary loss of the entropy model's quantiles."""
        return self.entropy_model.aux_loss()

    @property
    def portable(self) -> bool:
        """Whether compress() makes streams that decode on any machine and device (MSPEntropyModel.exact)."""
        return self.entropy_model.exact

    @torch.no_grad()
    def make_portable(self, x: Tensor | Iterable[Tensor]) -> None:
        """Makes streams portable: integer networks, calibrated on images x [B, 3, H, W] in [0, 1], or several such.

        After training, and again after more of it. Raises what forward and MSPEntropyModel.make_portable raise.
        """
        images = [x] if isinstance(x, Tensor) else x
        self.entropy_model.make_portable(self.g_a(self._checked("make_portable", image)) for image in images)

    @staticmethod
    def decodes_anywhere(strings: object) -> bool:
        """Whether `strings` of compress() hold portable streams only; they may be anything a file can hold."""
        if not (isinstance(strings, (list, tuple)) and len(strings) == 1 and isinstance(strings[0], (list, tuple))):
            return False
        from ..entropy import is_portable

        return all(isinstance(stream, bytes) and is_portable(stream) for stream in strings[0])

    def update(self, scale_table: object = None, force: bool = False) -> bool:
        """Makes the coding tables, where there are none or by force; returns whether it did.

        scale_table is CompressAI's argument, of no meaning here. Raises ValueError for weights that are not finite.
        """
        return self.entropy_model.update(force=force)

    @torch.no_grad()
    def compress(self, x: Tensor) -> dict[str, list[list[bytes]] | torch.Size]:
        """{"strings": [[bytes of each sample]], "shape": (h, w) of the latent} of x [B, 3, H, W] in [0, 1].

        Raises what forward and MSPEntropyModel.compress raise.
        """
        return self.compress_latent(self._analysis(self._checked("compress", x)))

    def compress_latent(self, y: Tensor) -> dict[str, list[list[bytes]] | torch.Size]:
        """compress() for a latent y [B, M, h, w], the analysis's or another, as `overfit` finds them.

        Raises what MSPEntropyModel.compress raises.
        """
        return {"strings": [self.entropy_model.compress(y)], "shape": y.shape[2:]}

    @torch.no_grad()
    def decompress(self, strings: Sequence[Sequence[bytes]], shape: Sequence[int]) -> dict[str, Tensor]:
        """{"x_hat" [B, 3, 16 h, 16 w], clamped to [0, 1]} of what compress() gave.

        Raises BitstreamError where strings are not [[bytes, ...]], and what MSPEntropyModel.decompress raises.
        """
        if len(strings) != 1 or not isinstance(strings[0], (list, tuple)):
            raise BitstreamError(f"MSPCodec.decompress: strings must be one list of bytes, got {len(strings)} entries")
        pixels = _Pixels(self.g_s, self.tile)
        if self._own_transforms:  # known to read nothing on the host: a graph can hold them
            return {"x_hat": self.entropy_model.decompress(strings[0], shape, then=pixels)}
        return {"x_hat": pixels(self.entropy_model.decompress(strings[0], shape))}

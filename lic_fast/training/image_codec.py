"""A trained checkpoint as an image codec: 8-bit RGB pixels to container bytes and back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lic_fast.codec import CDC, BitstreamError, MSPCodec, Overfit, Stream, overfit, pack, unpack
from lic_fast.patch import KINDS, accelerate
from lic_fast.training.checkpoint import load_checkpoint
from lic_fast.training.config import from_dict
from lic_fast.training.data import to_tensor
from lic_fast.training.errors import TrainingError, optional_import
from lic_fast.training.loss import RateDistortionLoss
from lic_fast.training.models import build_model, load_weights, resolve_channels, resolve_device
from lic_fast.training.portable import without_integers

_MAX_LATENT_CHANNELS = 1 << 14
_VERIFY_DB = 1.0
_logger = logging.getLogger("lic_fast.training")


def model_digest(model: torch.nn.Module) -> bytes:
    """BLAKE2b-128 of the parameters and coding tables: names (sorted), dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def psnr(pixels, other) -> float:
    """PSNR in dB of two uint8 arrays of one shape; infinite where they are equal."""
    numpy = optional_import("numpy")
    mse = float(numpy.mean((pixels.astype(numpy.float64) - other) ** 2))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Full-precision, deterministic cuDNN kernels: encoder and decoder must compute the same scales."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False, False
    try:
        with torch.no_grad():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


class ImageCodec:
    """Codes photographs with the weights of one checkpoint.

    device auto is CUDA where there is one, except for models that code pixel by pixel (mbt2018,
    cheng2020-anchor, cheng2020-attn): CompressAI's coder for these is sequential on the CPU, where they are
    faster. `slow` chooses the slow weights of an --sma run; None, the default, takes them where there are
    any. Raises TrainingError (checkpoint, device) and ImportError.
    """

    def __init__(self, checkpoint: str | Path, *, device: str = "auto", slow: bool | None = None, command: str) -> None:
        saved = load_checkpoint(checkpoint, command)
        self.config = from_dict(saved["config"])
        self.command = command
        self.slow = saved["slow"] is not None if slow is None else slow
        if self.slow and saved["slow"] is None:
            raise TrainingError(f"{command}: {checkpoint} holds no slow weights; it was trained without --sma")
        channels = resolve_channels(self.config.model, self.config.channels, self.config.lmbda)
        self.model = build_model(self.config.model, channels)
        others = saved["slow"] is not None and not self.slow  # the integer networks are those of the slow weights
        weights = without_integers(saved["model"]) if others else saved["model"]
        load_weights(self.model, weights | (saved["slow"] if self.slow else {}))
        # The same bytes and pixels, sooner. GDN's sums round otherwise in each backend: a stream's pixels must not.
        accelerate(self.model, only=[kind for kind in KINDS if kind != "gdn"], verbose=False)
        self.device = resolve_device(device, command)
        if hasattr(self.model, "_compress_ar") and self.device.type == "cuda":
            if device == "auto":
                self.device = torch.device("cpu")
            _logger.warning("%s: %s codes one latent after another, on %s", command, self.config.model, self.device)
        self._sampling: dict[str, Any] = {}
        self._prepare(checkpoint)
        own = getattr(self.model, "padding_multiple", None)
        self.multiple = own or max(64, getattr(self.model, "downsampling_factor", 64))

    def _prepare(self, checkpoint: str | Path) -> None:
        """Build the tables from the weights as they are now (training leaves none), always on the CPU."""
        for module in self.model.modules():
            if isinstance(getattr(module, "mask", None), Tensor):
                module.weight.data.mul_(module.mask)  # as its forward() does: one digest, used or not
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise TrainingError(
                f"{self.command}: the weights in {checkpoint} are not finite; use an earlier checkpoint"
            )
        try:
            self.model.eval().update(force=not getattr(self.model, "portable", False))
        except (ValueError, RuntimeError) as error:
            raise TrainingError(
                f"{self.command}: no coding tables from {checkpoint} ({_first_line(error)}); train longer"
            ) from error
        self.digest = model_digest(self.model)
        self.model.to(self.device)

    def _padded(self, pixels) -> Tensor:
        """[H, W, 3] uint8 -> [1, 3, H', W'] in [0, 1]; H', W' multiples of what the model asks; edges repeated."""
        x = to_tensor(pixels)[None].to(self.device).float().div_(255)
        height, width = x.shape[-2:]
        return F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")

    def overfit(self, pixels, *, lmbda: float | None = None, **options: Any) -> Overfit:
        """A cheaper latent for `pixels`, numpy [H, W, 3] uint8: lic_fast.codec.overfit with its options.

        lmbda: by default the checkpoint's. Raises TrainingError for models that are not MSPCodecs, and what it raises.
        """
        if not isinstance(self.model, MSPCodec):
            raise TrainingError(
                f"{self.command}: latents of {self.config.model} cannot be overfitted; use one of lic_fast's msp models"
            )
        lmbda = self.config.lmbda if lmbda is None else lmbda
        with _reproducible():
            return overfit(self.model, self._padded(pixels), lmbda=lmbda, size=pixels.shape[:2], **options)

    def sampled_by(self, **settings: Any) -> None:
        """From now on images are encoded to be sampled so: settings of CDC.sample(); None is the model's own.

        Raises TrainingError for models that do not sample, and ValueError for settings out of range.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        if not given:
            return
        if not isinstance(self.model, CDC):
            raise TrainingError(
                f"{self.command}: {self.config.model} has no sampler, got {', '.join(given)}; these are of cdc models"
            )
        self.model.check_settings(self.command, **given)
        self._sampling |= given

    def sampling_of(self, data: bytes) -> dict[str, Any]:
        """The settings by which the container `data` is sampled; of a model that does not sample, none.

        Raises BitstreamError.
        """
        return self.model.settings_of(unpack(data).strings)[0]._asdict() if isinstance(self.model, CDC) else {}

    def show_progress(self) -> None:
        """A bar on stderr, where that is a terminal, for every image that is sampled. Raises ImportError for tqdm."""
        if isinstance(self.model, CDC):
            tqdm = optional_import("tqdm").tqdm
            self.model.progress = lambda steps: tqdm(steps, desc="sampling", unit="step", leave=False, disable=None)

    def encode(self, pixels, y: Tensor | None = None) -> bytes:
        """The container of `pixels`, numpy [H, W, 3] uint8; of latent y where given, which overfit() found for them.

        Raises TrainingError where the model cannot.
        """
        height, width = pixels.shape[:2]
        try:
            with _reproducible():
                if y is None:
                    coded = self.model.compress(self._padded(pixels), **self._sampling)
                else:
                    coded = self.model.compress_latent(y)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            raise TrainingError(
                f"{self.command}: {self.config.model} cannot code this image ({_first_line(error)}); train it longer"
            ) from error
        stream = Stream(
            self.config.model, self.digest, height, width, _plain(coded["shape"]), coded["strings"],
            cuda=self.device.type == "cuda" and not self._decodes_anywhere(coded["strings"]), slow=self.slow,
        )  # fmt: skip
        return pack(stream)

    def verified(self, pixels, data: bytes, y: Tensor | None = None) -> tuple[bytes, Any]:
        """(`data`, the container of `pixels`, with the CRC-32 of its decoded pixels added; those pixels).

        y: as encode() had it. Raises TrainingError where it decodes to more than 1 dB below what the model promises.
        What one that samples promises is what it decodes: its latents carry a check of their own.
        """
        decoded = self.decode(data)
        if isinstance(self.model, CDC):
            return pack(dataclasses.replace(unpack(data), check=zlib.crc32(decoded.tobytes()))), decoded
        promised, got = self.estimate(pixels, y)[1], psnr(pixels, decoded)
        if got < promised - _VERIFY_DB:
            raise TrainingError(
                f"{self.command}: the stream decodes to {got:.2f} dB, the model promises {promised:.2f} dB; "
                "use --device cpu"
            )
        return pack(dataclasses.replace(unpack(data), check=zlib.crc32(decoded.tobytes()))), decoded

    def decode(self, data: bytes):
        """The pixels, numpy [H, W, 3] uint8: x_hat rounded to 8 bits. Raises BitstreamError."""
        stream = unpack(data)
        self._must_match(stream)
        self._must_be_possible(stream)
        try:
            with _reproducible():
                x_hat = self.model.decompress(stream.strings, stream.shape)["x_hat"]
        except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BitstreamError(f"decode: {stream.model} rejects the stream ({_first_line(error)})") from error
        x_hat = x_hat[0, :, : stream.height, : stream.width]
        if x_hat.shape[-2:] != (stream.height, stream.width):
            raise BitstreamError(
                f"decode: the latents give {tuple(x_hat.shape[-2:])} pixels, the header says "
                f"{stream.height} x {stream.width}; malformed stream"
            )
        pixels = _to_pixels(x_hat)
        if stream.check is not None and zlib.crc32(pixels.tobytes()) != stream.check:
            if not self._decodes_anywhere(stream.strings):
                raise BitstreamError(
                    "decode: the pixels are not those the encoder saw, so this machine computes other values; "
                    "decode on the kind of machine, with the torch version, that encoded"
                )
            _logger.warning(
                "%s: the latents are the encoder's, but the synthesis rounds otherwise here: pixels may differ by 1 "
                "or so from those it saw", self.command,
            )  # fmt: skip
        return pixels

    def _decodes_anywhere(self, strings: Any) -> bool:
        return getattr(self.model, "decodes_anywhere", lambda _: False)(strings)

    def _must_match(self, stream: Stream) -> None:
        if stream.model != self.config.model:
            raise BitstreamError(
                f"decode: the stream was made with {stream.model}, got a checkpoint of {self.config.model}; "
                "give the checkpoint that made it"
            )
        if stream.digest != self.digest:
            raise BitstreamError(
                f"decode: the stream was made with weights {stream.digest.hex()[:12]}, the checkpoint holds "
                f"{self.digest.hex()[:12]}; give the checkpoint that made it"
            )
        here = self.device.type == "cuda"
        if stream.cuda != here and not self._decodes_anywhere(stream.strings):
            made = "cuda" if stream.cuda else "cpu"
            raise BitstreamError(
                f"decode: the stream was made on {made}, got {self.device.type}, which rounds otherwise; "
                f"use --device {made}"
            )

    def _must_be_possible(self, stream: Stream) -> None:
        """No latent may be larger than the image: checked before the model allocates any."""
        sides = stream.height + self.multiple, stream.width + self.multiple

        def visit(node: Any) -> None:
            if isinstance(node, dict):
                for entry in node.values():
                    visit(entry)
            elif isinstance(node, tuple) and node and all(isinstance(value, int) for value in node):
                channels = node[:-2]
                fits = len(node) in (2, 3) and node[-2] <= sides[0] and node[-1] <= sides[1]
                if not fits or any(value > _MAX_LATENT_CHANNELS for value in channels):
                    raise BitstreamError(f"decode: a latent of shape {node} in a stream of this size; malformed stream")
            elif isinstance(node, tuple):
                for entry in node:
                    visit(entry)
            else:
                raise BitstreamError(f"decode: the latent shape holds {node!r}; malformed stream")

        visit(stream.shape)

    def estimate(self, pixels, y: Tensor | None = None) -> tuple[float, float]:
        """(bits a pixel by likelihoods, PSNR in dB by the forward pass), for numpy [H, W, 3] uint8; y as in encode."""
        height, width = pixels.shape[:2]
        with _reproducible():
            x = self._padded(pixels)
            if y is None:
                output = getattr(self.model, "reconstruct", self.model)(x, **self._sampling)
            else:
                output = self.model.decoded(y)
            bpp = RateDistortionLoss(1.0)(output, x, x.new_zeros(()))["bpp"].item()
        promised = _to_pixels(output["x_hat"][0, :, :height, :width])
        return bpp * x.shape[-2] * x.shape[-1] / (height * width), psnr(pixels, promised)


def _to_pixels(x_hat: Tensor):
    """[3, H, W] in [0, 1] -> numpy [H, W, 3] uint8, rounded to the nearest, ties to even."""
    return x_hat.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def _plain(node: Any) -> Any:
    """CompressAI's latent shape as integers in tuples."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return tuple(_plain(value) for value in node)
    return int(node)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__

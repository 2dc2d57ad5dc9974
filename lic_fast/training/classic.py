"""Classic codecs, as Pillow and imagecodecs have them, in the form of ImageCodec: learned ones are measured beside."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from lic_fast.training.errors import TrainingError, optional_import


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How Pillow writes a format: its name there, the feature it needs, options, the usual qualities."""

    format: str
    feature: str
    options: dict[str, Any]
    qualities: tuple[float, ...]
    lowest: float
    highest: float


# Sub-sampling of the colours is what the encoders choose: 4:2:0 for jpeg, webp and avif.
_KINDS = {
    "jpeg": _Kind("JPEG", "jpg", {"optimize": True, "progressive": True}, (5, 10, 20, 30, 45, 60, 75, 85, 95), 1, 100),
    "jpeg2000": _Kind("JPEG2000", "jpg_2000", {"quality_mode": "dB"}, (24, 27, 30, 33, 36, 40), 10, 100),
    "webp": _Kind("WEBP", "webp", {"method": 6}, (1, 10, 25, 40, 60, 75, 88, 95), 0, 100),
    "avif": _Kind("AVIF", "avif", {"speed": 6}, (10, 20, 30, 40, 50, 60, 72, 85), 0, 100),
    "jxl": _Kind("JPEG XL", "", {"effort": 7}, (15, 10, 6, 4, 2.5, 1.5, 1), 0.01, 25),  # its distance, not a quality
}
CLASSIC = tuple(_KINDS)


class ClassicCodec:
    """One setting of a classic codec: 8-bit RGB pixels to a file's bytes and back.

    name: jpeg, jpeg2000 (its quality is a PSNR in dB), webp, avif (by Pillow), or jxl (by imagecodecs; its quality is
    the distance of JPEG XL, 25 to 0.01, less being better). Raises ValueError for names and qualities, ImportError for
    packages, TrainingError where Pillow was built without the format.
    """

    def __init__(self, name: str, quality: float, command: str = "evaluate") -> None:
        if name not in _KINDS:
            raise ValueError(f"{command}: unknown codec, got {name!r}; use some of {', '.join(CLASSIC)}")
        self.name, self.quality, self.command, self._kind = name, quality, command, _KINDS[name]
        if not self._kind.lowest <= quality <= self._kind.highest:
            raise ValueError(
                f"{command}: quality of {name} is out of range, got {quality:g}; "
                f"pass {self._kind.lowest:g} to {self._kind.highest:g}"
            )
        if name == "jxl":
            if not optional_import("imagecodecs").JPEGXL.available:
                raise TrainingError(f"{command}: this imagecodecs was built without JPEG XL; leave jxl out")
        elif not optional_import("PIL.features").check(self._kind.feature):
            raise TrainingError(
                f"{command}: this Pillow was built without {self._kind.format}; install another, or leave {name} out"
            )

    def encode(self, pixels) -> bytes:
        """The file of `pixels`, numpy [H, W, 3] uint8. Raises TrainingError where the format cannot hold them."""
        if self.name == "jxl":
            return optional_import("imagecodecs").jpegxl_encode(pixels, distance=self.quality, **self._kind.options)
        options, buffer = dict(self._kind.options), io.BytesIO()
        if self.name == "jpeg2000":
            options |= {"quality_layers": [self.quality], "irreversible": True}
        else:
            options["quality"] = round(self.quality)
        try:
            optional_import("PIL.Image").fromarray(pixels).save(buffer, format=self._kind.format, **options)
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"{self.command}: {self.name} cannot hold an image of {pixels.shape[1]}x{pixels.shape[0]} ({error}); "
                "leave it out"
            ) from error
        return buffer.getvalue()

    def decode(self, data: bytes):
        """The pixels of a file that encode() made."""
        if self.name == "jxl":
            return optional_import("imagecodecs").jpegxl_decode(data)
        with optional_import("PIL.Image").open(io.BytesIO(data)) as image:
            return optional_import("numpy").array(image.convert("RGB"))

    def estimate(self, pixels) -> tuple[None, None]:
        """Nothing: these codecs promise no rate."""
        return None, None


def usual_qualities(name: str) -> tuple[float, ...]:
    """The settings that make the curve of codec `name`. Raises ValueError for names."""
    if name not in _KINDS:
        raise ValueError(f"evaluate: unknown codec, got {name!r}; use some of {', '.join(CLASSIC)}")
    return _KINDS[name].qualities

"""Photographs: found, checked, decoded to 8-bit RGB, and cut into crops that the seed alone decides."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import logging
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lic_fast.training.config import TrainConfig
from lic_fast.training.errors import TrainingError, optional_import

# The natural colour photographs that scikit-image carries inside its wheel: no download.
SKIMAGE_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
CACHE_BYTES = 1 << 30  # decoded photographs kept in memory, first come first kept
_MAX_HELD_OUT = 256
_EXTERNAL_FORMATS = {"EPS", "WMF"}  # decoded by another program
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)
_ORDER, _CROP = 1, 2  # streams of the counter-based generator
_logger = logging.getLogger("lic_fast.training")


def draws(seed: int, stream: int, epoch: int, slot: int, count: int) -> list[int]:
    """`count` 64-bit integers, a function of the arguments alone (Philox 4x64, Salmon et al. 2011)."""
    numpy = optional_import("numpy")
    generator = numpy.random.Philox(key=[seed, stream], counter=[0, slot, epoch, 0])
    return [int(value) for value in numpy.atleast_1d(generator.random_raw(count))]


def load_rgb(path: Path):
    """The picture at `path` as a numpy array [H, W, 3] uint8.

    Grey, palette, CMYK and 16-bit pictures are converted; transparency is laid on white; the EXIF orientation
    is applied. Raises TrainingError where PIL cannot read all of it.
    """
    image_module = optional_import("PIL.Image")
    numpy = optional_import("numpy")
    try:
        with image_module.open(path) as image:
            image.load()
            return numpy.ascontiguousarray(_to_rgb(optional_import("PIL.ImageOps").exif_transpose(image)))
    except (*_BROKEN, image_module.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"cannot read the image {path}: {reason}; replace it") from error


def _to_rgb(image):
    """PIL image of any mode -> numpy [H, W, 3] uint8. Raises ValueError for values of unknown range."""
    numpy = optional_import("numpy")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = numpy.asarray(image).astype(numpy.float64)
        top = 1.0 if image.mode == "F" else 65535.0
        if values.min() < 0 or values.max() > top:  # written so that NaN, too, is caught below
            raise ValueError(f"values {values.min():g} to {values.max():g} in a picture of mode {image.mode}")
        if not numpy.isfinite(values).all():
            raise ValueError("the picture holds NaN or infinity")
        grey = numpy.rint(values * (255 / top)).astype(numpy.uint8)
        return numpy.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = optional_import("PIL.Image").new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    return numpy.asarray(image.convert("RGB"))


@dataclasses.dataclass
class Photos:
    """Readable photographs in the order of their names, and (name, reason) of the broken ones."""

    paths: list[Path]
    names: list[str]
    broken: list[tuple[str, str]]
    cache: dict[int, object] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int):
        """Photograph `index` as a numpy array [H, W, 3] uint8. Raises TrainingError."""
        held = self.cache.get(index)
        return load_rgb(self.paths[index]) if held is None else held

    def subset(self, indexes: list[int]) -> Photos:
        """The photographs `indexes`, sharing what is decoded."""
        cache = {new: self.cache[old] for new, old in enumerate(indexes) if old in self.cache}
        return Photos([self.paths[i] for i in indexes], [self.names[i] for i in indexes], [], cache)

    def fingerprint(self) -> str:
        """Tells two sets of file names apart; 32 hexadecimal digits."""
        return hashlib.blake2b("\n".join(self.names).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def warning(self) -> str | None:
        """One line about the broken files, or None."""
        if not self.broken:
            return None
        name, reason = self.broken[0]
        count = len(self.broken)
        return f"{count} unreadable image(s) left out of {len(self) + count}; {name}: {reason}"


def open_photos(folder: str | None, command: str, limit: int | None = None, cached: bool = True) -> Photos:
    """The photographs under `folder` (searched in depth; None: scikit-image's), each decoded once to check
    it.

    Files whose suffix PIL does not know, and hidden ones, are no images; the others that cannot be decoded to
    the end are counted as broken. Raises TrainingError where nothing usable is left.
    """
    paths, names = _skimage_photos() if folder is None else _find_images(Path(folder), command)
    paths, names = paths[:limit], names[:limit]
    cache, broken, lock, budget = {}, {}, threading.Lock(), [CACHE_BYTES if cached else 0]

    def check(index: int) -> None:
        try:
            pixels = load_rgb(paths[index])
        except TrainingError as error:
            broken[index] = str(error).partition(f"{paths[index]}: ")[2].removesuffix("; replace it")
            return
        with lock:
            if pixels.nbytes <= budget[0]:
                budget[0] -= pixels.nbytes
                cache[index] = pixels

    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(check, range(len(paths))))
    photos = Photos(paths, names, [], cache).subset([i for i in range(len(paths)) if i not in broken])
    photos.broken = [(names[i], broken[i]) for i in sorted(broken)]
    if not photos.paths:
        name, reason = photos.broken[0]
        raise TrainingError(
            f"{command}: no usable image in {folder}, got {len(broken)} unreadable ({name}: {reason}); "
            "give a folder of photographs"
        )
    return photos


def _find_images(folder: Path, command: str) -> tuple[list[Path], list[str]]:
    if not folder.is_dir():
        raise TrainingError(f"{command}: not a folder, got {folder}; give a folder of photographs")
    image_module = optional_import("PIL.Image")
    known = image_module.registered_extensions()
    suffixes = {s for s, kind in known.items() if kind in image_module.OPEN and kind not in _EXTERNAL_FORMATS}
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    }
    if not found:
        raise TrainingError(f"{command}: no image file in {folder}; give a folder of photographs")
    names = sorted(found)
    return [found[name] for name in names], names


def _skimage_photos() -> tuple[list[Path], list[str]]:
    root = Path(optional_import("skimage").data_dir)
    names = [name for name in SKIMAGE_PHOTOS if (root / name).is_file()]
    if not names:
        raise TrainingError(f"train: scikit-image carries no photographs in {root}; give a folder with --data DIR")
    return [root / name for name in names], names


def split_photos(photos: Photos) -> tuple[Photos, Photos | None]:
    """(training, held out). From 10 photographs on, every k-th by name is held out: k = 10, or more where
    that would hold out above 256. Below 10, none: the learning rate then follows the training loss.
    """
    if len(photos) < 10:
        return photos, None
    step = max(10, math.ceil(len(photos) / _MAX_HELD_OUT))
    held = set(range(step - 1, len(photos), step))
    kept = [i for i in range(len(photos)) if i not in held]
    return photos.subset(kept), photos.subset(sorted(held))


def open_run(config: TrainConfig) -> tuple[Photos, Photos | None, list[tuple[str, str]]]:
    """(training photographs, held-out ones or None, broken files of both folders); warns of the last."""
    photos = open_photos(config.data, "train")
    broken = photos.broken
    if config.val is None:
        kept, held = split_photos(photos)
    else:
        kept, held = photos, open_photos(config.val, "train")
        broken = broken + held.broken
    for opened in (photos, held):
        if opened is not None and opened.warning():
            _logger.warning("train: %s", opened.warning())
    return kept, held, broken


def mirrored(pixels, least: int):
    """`pixels` [H, W, 3], continued by reflection at its right and bottom until both sides reach `least`."""
    numpy = optional_import("numpy")
    height, width = pixels.shape[:2]
    grow = ((0, max(0, least - height)), (0, max(0, least - width)), (0, 0))
    return numpy.pad(pixels, grow, mode="symmetric") if grow[0][1] or grow[1][1] else pixels


def to_tensor(pixels) -> Tensor:
    """numpy [H, W, 3] uint8 -> tensor [3, H, W] uint8 of its own memory."""
    return torch.from_numpy(optional_import("numpy").array(pixels.transpose(2, 0, 1), order="C"))


class RandomCrops(torch.utils.data.Dataset):
    """Item (epoch, slot): a random crop [3, crop, crop] uint8, flipped left-right half of the time.

    Slot s shows photograph s modulo their number. Place and flip are a function of (seed, epoch, slot) alone,
    so neither the number of workers nor a resumption changes them. Smaller photographs are mirrored.
    """

    def __init__(self, photos: Photos, crop: int, seed: int) -> None:
        self.photos, self.crop, self.seed = photos, crop, seed

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        epoch, slot = item
        pixels = mirrored(self.photos.read(slot % len(self.photos)), self.crop)
        top, left, flip = draws(self.seed, _CROP, epoch, slot, 3)
        top %= pixels.shape[0] - self.crop + 1
        left %= pixels.shape[1] - self.crop + 1
        patch = pixels[top : top + self.crop, left : left + self.crop]
        return to_tensor(patch[:, ::-1] if flip >> 63 else patch)


class Schedule:
    """Which slots every batch shows. An epoch visits each photograph `visits` times and drops the last,
    partial batch; `visits` is the least number that gives an epoch `min_steps` batches.
    """

    def __init__(self, photos: int, batch_size: int, min_steps: int, seed: int) -> None:
        self.visits = math.ceil(batch_size * min_steps / photos)
        self.slots = photos * self.visits
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_epoch = self.slots // batch_size

    def batches(self, epoch: int, position: int) -> Iterator[list[tuple[int, int]]]:
        """Batches of (epoch, slot) without end, from batch `position` of `epoch` on."""
        while True:
            keys = torch.tensor([key >> 1 for key in draws(self.seed, _ORDER, epoch, 0, self.slots)])
            order = torch.argsort(keys, stable=True).tolist()
            for step in range(position, self.steps_per_epoch):
                chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                yield [(epoch, slot) for slot in chosen]
            epoch, position = epoch + 1, 0


def central_crops(photos: Photos, crop: int, batch_size: int) -> Iterator[Tensor]:
    """The centres of all photographs, in batches [<= batch_size, 3, crop, crop] uint8."""
    for start in range(0, len(photos), batch_size):
        batch = []
        for index in range(start, min(start + batch_size, len(photos))):
            pixels = mirrored(photos.read(index), crop)
            top, left = (pixels.shape[0] - crop) // 2, (pixels.shape[1] - crop) // 2
            batch.append(to_tensor(pixels[top : top + crop, left : left + crop]))
        yield torch.stack(batch)

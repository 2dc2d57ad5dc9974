"""Photographs of any kind become 8-bit RGB, and crops that depend on nothing but the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

image_module = pytest.importorskip("PIL.Image")

from lic_fast.training import TrainingError  # noqa: E402
from lic_fast.training.data import (  # noqa: E402
    RandomCrops,
    Schedule,
    draws,
    load_rgb,
    open_photos,
    split_photos,
)


def photograph(path: Path, seed: int = 0, height: int = 80, width: int = 96) -> Path:
    """A smooth random picture, so that no two crops are alike."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image_module.fromarray(small).resize((width, height), image_module.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(4):
        photograph(tmp_path / f"{index}.png", index)
    return tmp_path


def test_crops_depend_on_seed_epoch_and_slot_only(photos: Path) -> None:
    opened = open_photos(str(photos), "train")
    crops = RandomCrops(opened, 64, seed=3)
    before = crops[(2, 5)]
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(crops[(2, 5)], before)
    others = [RandomCrops(opened, 64, seed=4)[(2, 5)], crops[(3, 5)], crops[(2, 9)]]
    assert not any(torch.equal(other, before) for other in others)


def test_both_flips_and_all_places_occur(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(70, dtype=np.uint8)[None, :, None], (66, 70, 3))
    image_module.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    crops = RandomCrops(open_photos(str(tmp_path), "train"), 64, seed=0)
    starts = {
        (int(crop[0, 0, 0]), int(crop[0, 0, 1]) > int(crop[0, 0, 0])) for crop in (crops[(0, s)] for s in range(300))
    }
    assert {place for place, rising in starts if rising} == set(range(7))
    assert {place for place, rising in starts if not rising} == set(range(63, 70))


def test_an_epoch_visits_every_photograph_equally() -> None:
    schedule = Schedule(photos=5, batch_size=4, min_steps=10, seed=0)
    assert schedule.visits == 8 and schedule.steps_per_epoch == 10
    batches = schedule.batches(0, 0)
    epochs = [[next(batches) for _ in range(10)] for _ in range(2)]
    for number, epoch in enumerate(epochs):
        assert sorted(slot for batch in epoch for _, slot in batch) == list(range(40))
        assert {e for batch in epoch for e, _ in batch} == {number}
    assert [s for b in epochs[0] for _, s in b] != [s for b in epochs[1] for _, s in b]
    assert next(schedule.batches(1, 3)) == epochs[1][3]


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path) -> None:
    def read(image, name: str, **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return load_rgb(tmp_path / name)

    grey = image_module.new("L", (4, 3), 100)
    assert (read(grey, "l.png") == 100).all() and load_rgb(tmp_path / "l.png").shape == (3, 4, 3)
    deep = image_module.fromarray(np.full((3, 4), 0x8080, dtype=np.uint16))
    assert (read(deep, "i16.png") == 128).all()
    clear = image_module.new("RGBA", (4, 3), (10, 20, 30, 0))
    assert (read(clear, "rgba.png") == 255).all(), "hidden colours must not show"
    half = image_module.new("RGBA", (4, 3), (0, 0, 0, 128))
    assert abs(int(read(half, "half.png")[0, 0, 0]) - 127) <= 1
    palette = image_module.new("RGB", (4, 3), (200, 10, 60)).convert("P", palette=image_module.Palette.ADAPTIVE)
    assert (read(palette, "p.png") == (200, 10, 60)).all()
    assert (read(image_module.new("1", (4, 3), 1), "one.png") == 255).all()
    turned = image_module.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3))
    exif = turned.getexif()
    exif[0x0112] = 6
    assert read(turned, "turned.png", exif=exif).shape == (4, 3, 3)
    (tmp_path / "nan.tiff").unlink(missing_ok=True)
    image_module.fromarray(np.full((3, 4), np.nan, dtype=np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(TrainingError, match="NaN"):
        load_rgb(tmp_path / "nan.tiff")


def test_photographs_smaller_than_the_crop_are_mirrored(tmp_path: Path) -> None:
    photograph(tmp_path / "small.png", 0, 20, 30)
    crop = RandomCrops(open_photos(str(tmp_path), "train"), 64, seed=0)[(0, 0)]
    assert crop.shape == (3, 64, 64)
    assert torch.equal(crop[:, :20], crop[:, 20:40].flip(1)) and torch.equal(crop[:, :20], crop[:, 40:60])


def test_every_tenth_photograph_is_held_out(tmp_path: Path) -> None:
    for index in range(20):
        photograph(tmp_path / f"{index:02}.png", index, 16, 16)
    kept, held = split_photos(open_photos(str(tmp_path), "train"))
    assert held is not None and held.names == ["09.png", "19.png"] and len(kept) == 18
    assert not set(kept.names) & set(held.names)
    assert np.array_equal(held.read(1), load_rgb(tmp_path / "19.png"))
    few, none = split_photos(open_photos(str(tmp_path), "train", limit=9))
    assert none is None and len(few) == 9


def test_draws_are_a_fixed_function() -> None:
    first = draws(1, 2, 3, 4, 3)
    assert draws(1, 2, 3, 4, 3) == first
    assert len({tuple(draws(*key, 3)) for key in [(1, 2, 3, 4), (0, 2, 3, 4), (1, 1, 3, 4), (1, 2, 4, 3)]}) == 4

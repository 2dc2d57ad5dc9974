"""Large images through MSPCodec's transforms, a tile at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("compressai")

from lic_fast.codec import MSPCodec, _tiles
from lic_fast.entropy import Profile

SMALL = Profile(scales=2, groups=2, width=8, depth=1)


@pytest.fixture(scope="module", params=["light", "elic"])
def codec(request) -> MSPCodec:
    torch.manual_seed(0)
    made = MSPCodec(8, 8, profile=SMALL, transforms=request.param).eval()
    made.update()
    return made


def looks(transform: nn.Module, sides: tuple[int, int], channels: int, place: tuple[int, int]) -> torch.Tensor:
    """Which inputs (a bool of their rows and columns) the outputs about `place` depend on, by the gradient."""
    x = torch.randn(1, channels, *sides, requires_grad=True)
    y = transform(x)
    scale = y.shape[2] / sides[0]
    a, b = (int(p * scale) for p in place)
    size = max(1, int(scale))
    y[:, :, a : a + size, b : b + size].sum().backward()
    return x.grad.abs().amax((0, 1)) > 0


def test_the_halo_is_what_transforms_look_at(codec) -> None:
    for transform, channels, sides, factor in ((codec.g_a, 3, (800, 480), 16), (codec.g_s, 8, (50, 30), 1)):
        halo = _tiles.halo_of(transform, 16)
        place = (400, 240) if factor == 16 else (25, 15)
        seen = looks(transform, sides, channels, place).nonzero()
        reach = max((seen[:, i] // factor - place[i] // factor).abs().max().item() for i in range(2))
        assert reach <= halo <= 5 * reach + 3, (reach, halo)


@pytest.mark.parametrize(
    ("tile", "sides"), [(1, (16, 16)), (1, (48, 64)), (5, (160, 112)), (5, (272, 336)), (16, (272, 336))], ids=str
)
@torch.no_grad()
def test_tiles_give_the_whole(codec, tile: int, sides: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *sides)
    y = codec.g_a(x)
    torch.testing.assert_close(_tiles.analyse(codec.g_a, x, 16, tile), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_tiles.synthesise(codec.g_s, y, 16, tile), codec.g_s(y), rtol=1e-4, atol=1e-5)


def test_a_tiled_codec_decodes_what_it_promised(codec) -> None:
    x = torch.rand(1, 3, 112, 208)
    codec.tile = 4
    try:
        coded = codec.compress(x)
        with torch.no_grad():
            promised = codec(x)["x_hat"].clamp(0, 1)
        assert torch.equal(codec.decompress(**coded)["x_hat"], promised)
        calls = []
        handle = codec.g_s.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
        codec.decompress(**coded)
        handle.remove()
        limit = 4 + 2 * _tiles.halo_of(codec.g_s, 16)
        assert len(calls) == 8 and all(max(shape[2:]) <= limit for shape in calls)
    finally:
        del codec.tile


def test_training_is_not_tiled(codec) -> None:
    codec.tile = 1
    try:
        codec.train()(torch.rand(1, 3, 64, 64))["x_hat"].sum().backward()
        assert codec.g_a[0].weight.grad is not None
    finally:
        codec.eval().zero_grad()
        del codec.tile

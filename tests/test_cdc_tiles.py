"""CDC on large images: tiles of the sampler, what they share, and that their borders are not seen."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("compressai")

import lic_fast
from lic_fast.codec import CDC
from lic_fast.codec import _cdc_sampler as sampler
from lic_fast.codec._cdc_network import Sizes
from lic_fast.codec._cdc_tiles import cut, windows

SMALL = Sizes(width=8, levels=(1, 2, 2, 2, 2), map_channels=4)
GRID = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def codec() -> CDC:
    torch.manual_seed(0)
    made = CDC(sizes=SMALL).eval()
    made.update()
    return made


def latent(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 2 * torch.randn(1, 32, height // 16, width // 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("overlap", [64, 128, 256])
def test_tiles_cover_a_side_evenly(overlap: int) -> None:
    for tile in range(2 * overlap, 1025, 64):
        for side in range(64, 5000, 64):
            spans = cut(side, tile, overlap, GRID)
            lengths = {end - first for first, end in spans}
            assert spans[0][0] == 0 and spans[-1][1] == side and len(lengths) == 1 and max(lengths) <= max(tile, 1)
            assert all(first % GRID == 0 for first, _ in spans)
            assert all(a[1] - b[0] >= overlap for a, b in pairwise(spans))
            assert (len(spans) == 1) == (side <= tile)
            assert len(spans) == 1 or (len(spans) - 1) * (tile - overlap) + overlap < side, "one fewer would do"
    assert cut(70, 0, 64, GRID) == [(0, 70)]


@pytest.mark.parametrize("case", [(1408, 1024, 128), (1600, 1024, 512), (64, 128, 64), (4992, 128, 64)], ids=str)
def test_the_weights_of_a_place_sum_to_one(case: tuple[int, int, int]) -> None:
    side, spans = case[0], cut(*case, GRID)
    weights, total = windows(spans), torch.zeros(case[0])
    for (first, end), weight in zip(spans, weights, strict=True):
        total[first:end] += weight
        assert weight.dtype is torch.float32 and weight.min() >= 0
    torch.testing.assert_close(total, torch.ones(side), rtol=0, atol=1e-6)
    for i, ((_, end), (first, _)) in enumerate(pairwise(spans)):
        quarter = (end - first) // 4
        assert not weights[i][-quarter:].any() and not weights[i + 1][:quarter].any()
        step = (weights[i][1:] - weights[i][:-1]).abs().max()
        assert step <= 2 / (end - first) + 1e-6 or len(spans) > 2  # a ramp, no edge


class Local(torch.nn.Module):
    """In place of the U-Net: a function of the place alone, of which tiles must make what the whole makes."""

    def condition(self, maps):
        return maps

    def forward(self, x, time, *, parts):
        return torch.tanh(x + 3 * parts[0][:, :3] + time[:, :, None, None])


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize(("tile", "overlap"), [(128, 64), (192, 64), (256, 128)])
def test_tiles_see_the_maps_and_the_noise_of_their_places(codec, eta: float, tile: int, overlap: int) -> None:
    local = copy.deepcopy(codec).double()
    local.denoiser = Local()
    y_hat = latent(320, 448, torch.float64)
    settings = {"seed": 5, "steps": 3, "eta": eta, "overlap": overlap}
    whole, tiled = (local.sample(y_hat, tile=side, **settings) for side in (0, tile))
    assert (whole - tiled).abs().max() < 1e-6  # the windows are fp32
    assert whole.std() > 0.1


def test_borders_are_not_seen(codec, monkeypatch) -> None:
    """What tiles change is smooth: across their borders it jumps no more than elsewhere, and would without windows."""
    y_hat, settings = latent(128, 512), {"steps": 4, "overlap": 128}
    whole, tiled = (codec.sample(y_hat, tile=side, **settings) for side in (0, 320))
    (_, end), (first, _) = cut(512, 320, 128, GRID)
    assert (first, end) == (192, 320)

    def jumps(image: torch.Tensor) -> tuple[float, float]:
        """Of the change by tiles, from column to column: at the worst column of the overlap, and of the others."""
        change = (image - whole).diff(dim=3).abs().mean((0, 1, 2))
        return change[first - 1 : end].max().item(), torch.cat([change[: first - 1], change[end:]]).max().item()

    worst, elsewhere = jumps(tiled)
    assert 0 < worst < 2 * elsewhere

    def cut_at(place: int):
        def weights(spans):
            if len(spans) == 1:
                return windows(spans)
            places = [torch.arange(*span) for span in spans]
            return [(places[0] < place).float(), (places[1] >= place).float()]

        return weights

    for place in (first, end):  # where a tile ends, which is what windows keep out of sight
        monkeypatch.setattr(sampler, "windows", cut_at(place))
        assert jumps(codec.sample(y_hat, tile=320, **settings))[0] > 3 * worst


def test_a_large_image_is_never_in_a_network_as_a_whole(codec) -> None:
    seen: dict[str, int] = {}

    def note(name: str):
        return lambda module, inputs, output: seen.__setitem__(
            name, max(seen.get(name, 0), *(inputs[0].shape[2:] if inputs else (0,)))
        )

    model = copy.deepcopy(codec)
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)) and "hyper" not in name:
            module.register_forward_hook(note(name))
    x = torch.rand(1, 3, 384, 640)
    coded = model.compress(x, steps=1, tile=128, overlap=64)
    encoding = max(seen.values())
    seen.clear()
    model.decompress(**coded)
    assert encoding <= 128 + 2 * 64 and max(seen.values()) <= 128 + 2 * 128  # beside the tile, the halo
    assert max(size for name, size in seen.items() if name.startswith("denoiser")) == 128


def test_a_tiled_stream_is_exact_and_says_how_it_is_tiled(codec) -> None:
    x = torch.rand(1, 3, 192, 320)
    coded = codec.compress(x, steps=2, tile=128, overlap=64, eta=0.3, gamma=0.7)
    first, again = (copy.deepcopy(codec).decompress(**coded)["x_hat"] for _ in range(2))
    assert torch.equal(first, again) and first.shape == x.shape
    assert torch.equal(first, codec.reconstruct(x, steps=2, tile=128, overlap=64, eta=0.3, gamma=0.7)["x_hat"])
    (settings,) = codec.settings_of(coded["strings"])
    assert settings[-2:] == (128, 64) and settings.steps == 2
    whole = codec.compress(x, steps=2, tile=0, eta=0.3, gamma=0.7)
    assert not torch.equal(codec.decompress(**whole)["x_hat"], first)
    small = codec.compress(x[..., :128, :128], steps=2, tile=128, overlap=64)
    alone = codec.compress(x[..., :128, :128], steps=2, tile=0)
    assert torch.equal(codec.decompress(**small)["x_hat"], codec.decompress(**alone)["x_hat"])


@pytest.mark.parametrize(("height", "width", "tile"), [(511, 767, 1024), (767, 511, 256), (1365, 2048, 1024)], ids=str)
@torch.no_grad()
def test_latents_of_odd_and_large_photographs_are_exact(codec, height: int, width: int, tile: int) -> None:
    """As files have them: padded to 64."""
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 40, 40), (height, width), mode="bilinear")
    x = torch.nn.functional.pad(x, (0, -width % 64, 0, -height % 64), mode="replicate")
    coded = codec.compress(x, steps=1, tile=tile)
    (decoded,) = codec.latents(**coded)
    y_hat, _ = codec._latents(codec._analysed(2 * x - 1, tile))
    assert torch.equal(decoded, y_hat) and decoded.unique().numel() > 2
    if height * width < 1 << 19:
        first, again = (codec.decompress(**coded)["x_hat"] for _ in range(2))
        assert torch.equal(first, again)
        other = codec.decompress(**codec.compress(x, steps=1, tile=tile, seed=1))["x_hat"]
        assert not torch.equal(first, other)


@pytest.mark.parametrize("predicts", ["x", "eps"])
@pytest.mark.parametrize("tile", [0, 128])
def test_backends_agree_within_the_stated_tolerance(predicts: str, tile: int) -> None:
    """docs/CDC.md: 1e-4 of the range of pixels in fp32, the noise to the bit; so 8-bit pixels differ by 1 at most."""
    torch.manual_seed(2)
    model = CDC(sizes=SMALL, predicts=predicts).eval()
    y_hat = latent(128, 192)
    images = {}
    for backend in ("reference", "cpp"):
        if lic_fast.explain("channel_norm", "cpu").reasons.get(backend) is not None:
            pytest.skip("the C++ library is not built here")
        with lic_fast.use_backend(backend):
            images[backend] = model.sample(y_hat, steps=17, eta=0.5, tile=tile, overlap=64) / 2
    scale = max(1.0, images["reference"].abs().max().item())
    assert (images["reference"] - images["cpp"]).abs().max() < 1e-4 * scale


def test_what_tiles_may_be(codec) -> None:
    x = torch.rand(1, 3, 64, 64)
    for settings, message in (
        ({"tile": 100}, "tile must be a multiple of 64"), ({"tile": -64}, "tile must be"), ({"tile": 1 << 16}, "65536"),
        ({"overlap": 65}, "overlap must be a multiple"), ({"tile": 128, "overlap": 128}, "half of a tile, got 128 of"),
        ({"overlap": 0}, "overlap must be 64 to half"), ({"tile": 256.0}, "tile must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            codec.compress(x, **settings)
    with pytest.raises(ValueError, match="multiples of 64, got 144 x 64 pixels"):
        codec.sample(torch.zeros(1, 32, 9, 4), steps=1, tile=128, overlap=64)


def test_the_models_own_tiles_suit_a_coarser_grid() -> None:
    with torch.device("meta"):
        deep = CDC(sizes=Sizes(width=8, levels=(1,) * 9, map_channels=4))
    assert deep.padding_multiple == 256
    assert deep._settings("test", 0, *[None] * 5)[-2:] == (1024, 256)


def test_a_bar_sees_the_steps_of_all_tiles(codec) -> None:
    model, seen = copy.deepcopy(codec), SimpleNamespace(total=0, done=0, closed=False)

    def bar(steps):
        seen.total = len(steps)
        for step in steps:
            seen.done += 1
            yield step
        seen.closed = True

    model.progress = bar
    model.sample(latent(192, 128), steps=2, tile=128, overlap=64)
    assert seen == SimpleNamespace(total=4, done=4, closed=True)

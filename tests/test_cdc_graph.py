"""CDC's sampler recorded as CUDA graphs: what is recorded, when, and for how long; with a GPU, that it is the same."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("compressai")

from lic_fast.codec import CDC, _cdc_graph, _cdc_sampler
from lic_fast.codec._cdc_network import Sizes

SMALL = Sizes(width=8, levels=(1, 2, 2, 2, 2), map_channels=4)


@pytest.fixture
def codec() -> CDC:
    torch.manual_seed(0)
    return CDC(sizes=SMALL).eval()


@pytest.fixture
def captures(monkeypatch) -> list[int]:
    """Recordings on the CPU: a replay does the work again over the recorded inputs. [captures, replays]."""
    counts = [0, 0]

    def captured(work):
        counts[0] += 1
        result = torch.full_like(work(), float("nan"))  # as a capture, which computes nothing

        def replay() -> None:
            counts[1] += 1
            result.copy_(work())

        return replay, result

    monkeypatch.setattr(_cdc_graph, "captured", captured)
    monkeypatch.setattr(_cdc_sampler, "recordable", lambda device: True)
    return counts


def latent(height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(1, 32, height // 16, width // 16, generator=torch.Generator().manual_seed(seed))


def plain(codec: CDC, *args: torch.Tensor, **settings: object) -> torch.Tensor:
    model = copy.deepcopy(codec)
    model.cuda_graph = False
    return model.sample(*args, **settings)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_images_and_seeds_after_the_first_are_replayed(codec, captures, eta: float) -> None:
    for number in range(4):
        settings = {"seed": number * 77, "steps": 3, "eta": eta, "gamma": 0.1 * number}
        found = codec.sample(latent(seed=number), **settings)
        assert torch.equal(found, plain(codec, latent(seed=number), **settings))
    assert captures == [1, 3]
    kept = found.clone()
    codec.sample(latent(seed=9), steps=3, eta=eta)
    assert torch.equal(found, kept), "the result is the caller's"


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_tiles_share_one_recording(codec, captures, eta: float) -> None:
    settings = {"steps": 2, "eta": eta, "tile": 128, "overlap": 64}
    found = codec.sample(latent(192, 256), **settings)
    assert captures == [1, 5]
    torch.testing.assert_close(found, plain(codec, latent(192, 256), **settings), rtol=0, atol=0)


def test_weights_that_change_in_place_are_seen_and_moved_ones_make_it_anew(codec, captures) -> None:
    for _ in range(2):
        codec.sample(latent(), steps=2)
    with torch.no_grad():
        codec.denoiser.out.weight.mul_(1.5)
    assert torch.equal(codec.sample(latent(), steps=2), plain(codec, latent(), steps=2))
    assert captures == [1, 2]
    codec.denoiser.out.weight.data = codec.denoiser.out.weight.data.clone()
    for _ in range(2):
        assert torch.equal(codec.sample(latent(), steps=2), plain(codec, latent(), steps=2))
    assert captures == [2, 3]


def test_another_size_setting_or_mode_is_another_recording(codec, captures, monkeypatch) -> None:
    for change in ({}, {"steps": 3}, {"eta": 0.5}):
        for _ in range(2):
            codec.sample(latent(), **({"steps": 2} | change))
    assert captures == [3, 3]
    codec.sample(latent(128, 64), steps=2)
    assert captures == [3, 3] and len(codec._recordings._kept) == 2, "only the last ones are kept"
    for _ in range(2):
        codec.sample(latent(), steps=2)
    assert captures == [4, 4]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    codec.sample(latent(), steps=2)
    assert captures == [4, 4], "other kernels may be chosen"


def test_it_may_be_turned_off_and_needs_a_gpu(codec, captures, monkeypatch) -> None:
    codec.cuda_graph = False
    for _ in range(3):
        codec.sample(latent(), steps=1)
    assert captures == [0, 0]
    monkeypatch.undo()
    assert not _cdc_graph.recordable(torch.device("cpu"))
    codec.cuda_graph = True
    for _ in range(3):
        codec.sample(latent(), steps=1)
    assert not codec._recordings._kept


def test_when_a_gpu_records(monkeypatch) -> None:
    told, gpu = SimpleNamespace(chosen="triton"), torch.device("cuda")
    monkeypatch.setattr(_cdc_graph, "explain", lambda op, device: told)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _cdc_graph.recordable(gpu)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    assert not _cdc_graph.recordable(gpu)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    told.chosen = "reference"
    assert not _cdc_graph.recordable(gpu)
    told.chosen = "cuda"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _cdc_graph.recordable(gpu)


def test_a_copy_begins_without_recordings(codec, captures) -> None:
    for _ in range(2):
        codec.sample(latent(), steps=1)
    assert codec._recordings._kept and not copy.deepcopy(codec)._recordings._kept
    file = io.BytesIO()
    torch.save(codec._recordings, file)
    file.seek(0)
    assert not torch.load(file, weights_only=False)._kept


def test_a_bar_moves_by_all_steps_of_a_replay(codec, captures) -> None:
    seen = []
    codec.progress = lambda steps: (seen.append(step) or step for step in steps)
    for _ in range(3):
        codec.sample(latent(), steps=4)
    assert len(seen) == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("predicts", ["x", "eps"])
@pytest.mark.parametrize("settings", [{"eta": 0.0}, {"eta": 0.6}, {"tile": 128, "overlap": 64, "eta": 0.3}], ids=str)
def test_a_graph_on_a_gpu_gives_the_bits_of_single_launches(predicts: str, settings: dict, monkeypatch) -> None:
    torch.manual_seed(0)
    codec, eager = (CDC(sizes=SMALL, predicts=predicts).eval().cuda() for _ in range(2))
    eager.load_state_dict(codec.state_dict())
    eager.cuda_graph = False
    for seed in range(3):
        y_hat = latent(192, 256, seed).cuda()
        ours, theirs = (model.sample(y_hat, seed=seed, steps=5, **settings) for model in (codec, eager))
        assert torch.equal(ours, theirs)
    assert any(kept is not None for kept in codec._recordings._kept.values())
    with torch.no_grad():
        for model in (codec, eager):
            model.denoiser.out.weight.mul_(0.5)
    assert torch.equal(codec.sample(y_hat, steps=5, **settings), eager.sample(y_hat, steps=5, **settings))

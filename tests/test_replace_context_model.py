"""replace_context_model: the transforms of an image model, MSP between them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

compressai_models = pytest.importorskip("compressai.models")
pytest.importorskip("compressai.zoo")

import lic_fast  # noqa: E402
from lic_fast.codec import MSPCodec  # noqa: E402
from lic_fast.codec import replace_context_model as from_codec  # noqa: E402
from lic_fast.entropy import MSPEntropyModel, Profile, replace_context_model  # noqa: E402
from lic_fast.training.models import build_model, split_parameters  # noqa: E402

SMALL = Profile(scales=2, groups=2, width=8, depth=1)
MODELS = {
    "bmshj2018-factorized": (8, 12),
    "bmshj2018-factorized-relu": (8, 12),
    "bmshj2018-hyperprior": (8, 12),
    "mbt2018-mean": (8, 12),
    "mbt2018": (8, 12),
    "cheng2020-anchor": (8,),
    "cheng2020-attn": (8,),
    "cheng2020-anchor-checkerboard": (8,),
    "elic2022-official": (8, 20),
    "elic2022-chandelier": (8, 20),
    "msp-base": (8, 12),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_keeps_its_transforms_and_codes_with_msp(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, MODELS[name]).eval()
    before = copy.deepcopy(model.state_dict())
    codec = replace_context_model(model, SMALL)
    assert type(codec) is MSPCodec and codec.g_a is model.g_a and codec.g_s is model.g_s and not codec.training
    assert (
        isinstance(codec.entropy_model, MSPEntropyModel) and codec.entropy_model.schedule.channels == MODELS[name][-1]
    )
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    masked = [key for key in changed if key.endswith("context_prediction.weight")]
    assert changed == masked, "those are what CompressAI's own forward() masks in place"
    codec.update()
    x = torch.rand(1, 3, 64, 48)
    coded = codec.compress(x)
    with torch.no_grad():
        output = codec(x)
        assert torch.equal(model.g_a(x), codec.g_a(x))
    assert torch.equal(codec.decompress(**coded)["x_hat"], output["x_hat"].clamp(0, 1))


def test_the_new_part_learns_between_frozen_transforms() -> None:
    torch.manual_seed(0)
    model = build_model("mbt2018", (8, 12)).train()
    codec = from_codec(model, SMALL)
    assert codec.training and codec.entropy_model.training
    codec.g_a.requires_grad_(False)
    codec.g_s.requires_grad_(False)
    kept = copy.deepcopy(codec.g_a.state_dict())
    main, quantiles = split_parameters(codec)
    assert [name for name, _ in quantiles] == ["entropy_model.bottleneck.quantiles"]
    optimizer = torch.optim.Adam([p for _, p in main if p.requires_grad], lr=3e-3)
    x, losses = torch.rand(2, 3, 64, 64), []
    for _ in range(30):
        bits = -codec(x)["likelihoods"]["y"].log2().sum()
        optimizer.zero_grad()
        bits.backward()
        optimizer.step()
        losses.append(bits.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(torch.equal(value, kept[key]) for key, value in codec.g_a.state_dict().items())


def test_gradients_reach_transforms_that_are_not_frozen() -> None:
    codec = replace_context_model(build_model("mbt2018-mean", (8, 12)), SMALL)
    output = codec(torch.rand(1, 3, 64, 64))
    (output["x_hat"].square().mean() - output["likelihoods"]["y"].log2().mean()).backward()
    parts = (codec.g_a, codec.g_s, codec.entropy_model.network)
    assert all(p.grad is not None and p.grad.isfinite().all() for part in parts for p in part.parameters())


def test_modes_hooks_and_random_numbers_are_left_alone() -> None:
    model = build_model("elic2022-official", (8, 20)).train()
    model.g_s.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = [len(part._forward_hooks) for part in (model.g_a, model.g_s)]
    replace_context_model(model, SMALL)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [len(part._forward_hooks) for part in (model.g_a, model.g_s)] == hooks
    with pytest.raises(ValueError, match="profile must be one of"):
        replace_context_model(model, "huge")
    assert [len(part._forward_hooks) for part in (model.g_a, model.g_s)] == hooks


def test_an_accelerated_model_and_profiles_by_name() -> None:
    model = build_model("mbt2018-mean", (8, 12)).eval()
    lic_fast.accelerate(model, verbose=False)
    codec = replace_context_model(model, "fast", mixture=2)
    assert codec.g_a is model.g_a and codec.entropy_model.mixture == 2
    assert len(codec.entropy_model.schedule.steps) == 10
    assert codec(torch.rand(1, 3, 32, 32))["x_hat"].shape == (1, 3, 32, 32)


class Own(nn.Module):
    """A model of one's own, with what may be wrong with it."""

    def __init__(self, stride: int = 16, wrong: str = "") -> None:
        super().__init__()
        self.g_a, self.g_s = nn.Conv2d(3, 8, stride, stride), nn.ConvTranspose2d(8, 3, stride, stride)
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.wrong == "scaled":
            x = 2 * x
        y = self.g_a(x)
        if self.wrong == "twice":
            y = y + self.g_a(x)
        if self.wrong == "fails":
            raise RuntimeError("no such picture\nsecond line")
        x_hat = self.g_s(y.round())
        return {"x_hat": x_hat + 1 if self.wrong == "after" else x_hat.clamp(0, 1)}


@pytest.mark.parametrize("name", [name + "-vbr" for name in ("bmshj2018-hyperprior", "mbt2018-mean", "mbt2018")])
def test_variable_rates_are_refused(name: str) -> None:
    from compressai.registry import MODELS as registered

    model = registered[name](8, 12)
    with pytest.raises(ValueError, match=r"replace_context_model: .* gain for each rate"):
        replace_context_model(model)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("scaled", "what g_s takes is not what g_a gave"),
        ("twice", "g_a was called 2 times"),
        ("after", 'output "x_hat" is not what g_s gave'),
        ("fails", r"does not take a picture .*no such picture; give"),
    ],
)
def test_models_of_another_form_are_refused_in_one_line(wrong: str, said: str) -> None:
    model = Own(wrong=wrong)
    with pytest.raises(ValueError, match=said) as caught:
        replace_context_model(model, SMALL)
    assert "\n" not in str(caught.value) and not model.g_a._forward_hooks and model.training


def test_models_of_ones_own() -> None:
    assert replace_context_model(Own(), SMALL)(torch.rand(1, 3, 32, 32))["x_hat"].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"the latent of \[1, 3, 128, 128\] is \[1, 8, 16, 16\], not"):
        replace_context_model(Own(stride=8), SMALL)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="must have an analysis g_a and a synthesis g_s, got Linear"):
        replace_context_model(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got DataParallel"):
        replace_context_model(nn.DataParallel(build_model("mbt2018-mean", (8, 12))))
    with pytest.raises(TypeError, match=r"fp32 weights, got torch\.float64"):
        replace_context_model(build_model("mbt2018-mean", (8, 12)).double())

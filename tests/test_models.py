"""The models that train: their names, sizes and precision."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("compressai")

from lic_fast.training import models
from lic_fast.training.models import build_model, model_class, resolve_channels, split_parameters
from lic_fast.training.precision import keep_entropy_fp32


def test_the_registry_is_compressais_without_video_clouds_and_variable_rates() -> None:
    assert set(models.MODELS) >= {
        "bmshj2018-factorized",
        "bmshj2018-factorized-relu",
        "bmshj2018-hyperprior",
        "mbt2018-mean",
        "mbt2018",
        "cheng2020-anchor",
        "cheng2020-attn",
        "cheng2020-anchor-checkerboard",
        "elic2022-official",
        "elic2022-chandelier",
    }
    assert not any("vbr" in name or "pcc" in name or name == "ssf2020" for name in models.MODELS)


@pytest.mark.parametrize("m", [20, 33, 128, 136])
def test_elic_takes_any_latent_size_from_20(m: int) -> None:
    model = build_model("elic2022-official", (8, m))
    assert sum(model.groups) == m and min(model.groups) >= 1
    assert model(torch.rand(1, 3, 64, 64))["likelihoods"]["y"].shape == (1, m, 4, 4)


def test_only_quantiles_belong_to_the_auxiliary_loss() -> None:
    model = build_model("elic2022-official", (8, 20))
    main, quantiles = split_parameters(model)
    assert [name for name, _ in quantiles] == ["latent_codec.hyper.entropy_bottleneck.quantiles"]
    assert len(main) + 1 == len(list(model.parameters()))


def test_bf16_keeps_likelihoods_in_fp32() -> None:
    model = build_model("mbt2018-mean", (8, 12))
    assert keep_entropy_fp32(model, "cpu") == 2
    seen = []
    model.g_s.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    model.g_a[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.rand(1, 3, 64, 64))
    assert all(value.dtype == torch.float32 for value in output["likelihoods"].values())
    assert seen == [torch.bfloat16, torch.float32]


def test_default_channels_follow_lambda() -> None:
    assert resolve_channels("mbt2018-mean", None, 0.0130) == (128, 192)
    assert resolve_channels("mbt2018-mean", None, 0.0483) == (192, 320)
    assert resolve_channels("cheng2020-attn", None, 0.0018) == (128,)
    assert resolve_channels("elic2022-official", None, 0.0130) == (192, 320)
    assert model_class("elic2022-chandelier").__name__ == "Elic2022Chandelier"

"""param_groups: every parameter in one group, and in the right one, for real models and an ordinary one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from lic_fast.optim import SMA, SOAP, param_groups


def placed(model: nn.Module) -> dict[str, str]:
    """name -> group ("weights", "undecayed", "adam"), with every parameter in at most one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    result: dict[str, str] = {}
    for group in param_groups(model):
        extra = {key: value for key, value in group.items() if key != "params"}
        kind = {
            (): "weights",
            (("weight_decay", 0.0),): "undecayed",
            (("weight_decay", 0.0), ("precondition", False)): "adam",
        }[tuple(extra.items())]
        assert group["params"]
        for parameter in group["params"]:
            assert names[parameter] not in result
            result[names[parameter]] = kind
    return result


class Plain(nn.Module):
    """What a stranger's model may have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.batch_norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 3)
        self.layer_norm = nn.LayerNorm([4, 5])
        self.attention = nn.MultiheadAttention(4, 2)
        self.wrapped = PreNorm()
        self.scale = nn.Parameter(torch.ones(()))
        self.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))


class PreNorm(nn.Module):
    """Its own parameters are a norm's; those of what it calls are not."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1))
        self.inner = nn.Linear(4, 4)


def test_an_ordinary_model() -> None:
    assert placed(Plain()) == {
        "conv.weight": "weights",
        "conv.bias": "undecayed",
        "batch_norm.weight": "undecayed",
        "batch_norm.bias": "undecayed",
        "up.weight": "weights",
        "up.bias": "undecayed",
        "layer_norm.weight": "undecayed",
        "layer_norm.bias": "undecayed",
        "attention.in_proj_weight": "weights",
        "attention.in_proj_bias": "undecayed",
        "attention.out_proj.weight": "weights",
        "attention.out_proj.bias": "undecayed",
        "wrapped.gain": "undecayed",
        "wrapped.inner.weight": "weights",
        "wrapped.inner.bias": "undecayed",
        "scale": "undecayed",
        "relative_position_bias_table": "undecayed",
    }


@pytest.mark.parametrize("name", ["mbt2018-mean", "cheng2020-anchor", "elic2022-official"])
def test_compressai_models(name: str) -> None:
    models = pytest.importorskip("compressai.models")
    model = {
        "mbt2018-mean": lambda: models.MeanScaleHyperprior(8, 12),
        "cheng2020-anchor": lambda: models.Cheng2020Anchor(8),
        "elic2022-official": lambda: models.Elic2022Official(8, 20, groups=[1, 1, 2, 4, 12]),
    }[name]()
    found = placed(model)
    modules = dict(model.named_modules())
    for parameter_name, parameter in model.named_parameters():
        module, _, last = parameter_name.rpartition(".")
        if last == "quantiles":
            assert parameter_name not in found
        elif "entropy_bottleneck." in parameter_name:
            assert found[parameter_name] == "adam", parameter_name
        elif parameter.dim() < 2 or type(modules[module]).__name__ == "GDN":
            assert found[parameter_name] == "undecayed", parameter_name
        else:
            assert found[parameter_name] == "weights", parameter_name
            assert last == "weight" and parameter.dim() == 4
    kinds = set(found.values())
    assert kinds == {"weights", "undecayed", "adam"} and len(found) == len(list(model.parameters())) - 1


def test_gdn_and_bottlenecks_are_known_by_the_name_of_a_base_class() -> None:
    class GDN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.eye(3))

    class Mine(GDN):
        pass

    class EntropyBottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.quantiles = nn.Parameter(torch.ones(2, 1, 3))

    class Other(EntropyBottleneck):
        pass

    found = placed(nn.ModuleDict({"a": Mine(), "b": Other()}))
    assert found == {"a.gamma": "undecayed", "b.inner.weight": "adam", "b.inner.bias": "adam"}
    assert placed(Other()) == {"inner.weight": "adam", "inner.bias": "adam"}, "a bottleneck alone; no empty groups"


def test_shared_and_frozen_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    model["again"] = model["a"]
    assert placed(model) == {"a.weight": "weights", "a.bias": "undecayed", "b.bias": "undecayed"}


def test_the_groups_serve_soap_sma_and_adam() -> None:
    for make in (SOAP, torch.optim.Adam, lambda groups: SMA(SOAP(groups))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        optimizer = make(param_groups(model))
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.rand(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        optimizer.load_state_dict(optimizer.state_dict())
    assert [group["weight_decay"] for group in SOAP(param_groups(Plain())).param_groups] == [0.01, 0.0]


def test_what_is_refused_is_told() -> None:
    with pytest.raises(TypeError, match="Module, got list; pass the model"):
        param_groups([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="'weight' of LazyLinear has no shape yet"):
        param_groups(nn.Sequential(nn.LazyLinear(3)))


def test_compressai_is_not_imported() -> None:
    code = "import sys, torch\nfrom lic_fast.optim import param_groups\nparam_groups(torch.nn.Linear(2, 2))\n"
    subprocess.run([sys.executable, "-c", code + "assert 'compressai' not in sys.modules"], check=True, timeout=120)

"""lic_fast.accelerate and restore on CompressAI's models: in place, and the same models as before."""

from __future__ import annotations

import copy
import io
import os
import pickle
import socket

import pytest
import torch
from compressai import entropy_models as stock
from compressai import models
from compressai.layers import GDN
from torch import nn

import lic_fast
from lic_fast import entropy, patch

MODELS = {
    "bmshj2018-factorized": lambda: models.FactorizedPrior(8, 12),
    "bmshj2018-factorized-relu": lambda: models.FactorizedPriorReLU(8, 12),
    "bmshj2018-hyperprior": lambda: models.ScaleHyperprior(8, 12),
    "mbt2018-mean": lambda: models.MeanScaleHyperprior(8, 12),
    "mbt2018": lambda: models.JointAutoregressiveHierarchicalPriors(8, 12),
    "cheng2020-anchor": lambda: models.Cheng2020Anchor(8),
    "cheng2020-attn": lambda: models.Cheng2020Attention(8),
    "cheng2020-anchor-checkerboard": lambda: models.Cheng2020AnchorCheckerboard(8),
    "elic2022-official": lambda: models.Elic2022Official(16, 20, [4, 4, 4, 4, 4]),
    "elic2022-chandelier": lambda: models.Elic2022Chandelier(16, 20, [4, 4, 4, 4, 4]),
    "bmshj2018-hyperprior-vbr": lambda: models.ScaleHyperpriorVbr(8, 12),
    "mbt2018-mean-vbr": lambda: models.MeanScaleHyperpriorVbr(8, 12, vr_entbttlnck=True),
    "mbt2018-vbr": lambda: models.JointAutoregressiveHierarchicalPriorsVbr(8, 12),
}
every_model = pytest.mark.parametrize("name", MODELS)
some_models = pytest.mark.parametrize("name", ["bmshj2018-factorized", "mbt2018-mean", "mbt2018"])
LATENTS = (stock.EntropyBottleneck, stock.GaussianConditional)


def made(name):
    """A model with densities wider than those of fresh ones, and a scale beside its mean."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.mul_(1.3)
    return model


def accelerated(model, **arguments):
    ours = copy.deepcopy(model)
    return ours, lic_fast.accelerate(ours, verbose=False, **arguments)


def image(samples=1, size=64):
    return torch.rand(samples, 3, size, size, generator=torch.Generator().manual_seed(1))


def with_torch_noise(model):
    for module in model.modules():
        if isinstance(module, LATENTS):
            module.noise = "torch"
    return model


def loss_and_gradients(model, x):
    out = model(x)
    rate = sum(p.log().sum() for p in out["likelihoods"].values()) / -x.numel()
    loss = rate + 10 * (out["x_hat"] - x).square().mean()
    gradients = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    return out, loss.detach(), gradients


def compare(ours, theirs, x, seed=0):
    results = []
    for model in (ours, theirs):
        torch.manual_seed(seed)
        results.append(loss_and_gradients(model, x))
    (out, loss, gradients), (expected, expected_loss, expected_gradients) = results
    torch.testing.assert_close(out["x_hat"], expected["x_hat"], rtol=1e-4, atol=1e-5)
    for key, value in expected["likelihoods"].items():
        torch.testing.assert_close(out["likelihoods"][key], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for a, b in zip(gradients, expected_gradients, strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (a, b))
        assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-7


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_are_the_stock_models(name, training):
    theirs = made(name).train(training)
    ours, report = accelerated(theirs)
    assert report.swapped
    compare(with_torch_noise(ours), theirs, image())


def compress(model, x):
    with torch.no_grad():
        return model.compress(x)


def decompress(model, coded):
    with torch.no_grad():
        return model.decompress(coded["strings"], coded["shape"])["x_hat"]


@every_model
def test_streams_are_the_stock_models(name):
    theirs = made(name).eval()
    ours, _ = accelerated(theirs, only=[kind for kind in patch.KINDS if kind != "gdn"])
    theirs.update()  # ours makes its own tables, but for a bottleneck of variable rate, which is CompressAI's
    if any(isinstance(module, stock.EntropyModelVbr) for module in ours.modules()):
        ours.update()
    x = image(1, 64)
    a, b = compress(ours, x), compress(theirs, x)
    assert a["strings"] == b["strings"] and a["shape"] == b["shape"]
    assert torch.equal(decompress(ours, b), decompress(theirs, a))
    lic_fast.accelerate(ours, only="gdn", verbose=False)  # whose sums round otherwise: the last bits of pixels differ
    torch.testing.assert_close(decompress(ours, b), decompress(theirs, b), rtol=1e-4, atol=1e-5)
    assert not ours.update() and ours.update(force=True)
    keys = [key for key in theirs.state_dict() if "cdf" in key or "offset" in key or "scale_table" in key]
    assert keys and all(torch.equal(ours.state_dict()[key], theirs.state_dict()[key]) for key in keys)


@every_model
def test_swaps_in_place_and_back(name):
    model = made(name)
    classes = {path: type(module) for path, module in model.named_modules()}
    objects = [*model.modules(), *model.parameters(), *model.buffers()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = lic_fast.accelerate(model, verbose=False)
    swapped = {entry.path for entry in report.swapped}
    assert swapped == {path for path, module in model.named_modules() if type(module) is not classes[path]}
    exactly = (*LATENTS, stock.GaussianMixtureConditional, *([GDN] if "GDN" in entropy.__all__ else []))
    assert swapped >= {path for path, kind in classes.items() if kind in exactly}
    for entry in report.kept:
        assert classes[entry.path].__name__ == entry.kind and entry.reason
    kept = {entry.path for entry in report.kept}
    assert {path for path, kind in classes.items() if issubclass(kind, stock.EntropyModelVbr)} <= kept
    assert all(path in str(report) for path in kept)
    assert all(a is b for a, b in zip(objects, [*model.modules(), *model.parameters(), *model.buffers()], strict=True))
    assert not lic_fast.accelerate(model, verbose=False).swapped
    assert {entry.path for entry in lic_fast.restore(model).swapped} == swapped
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not lic_fast.restore(model).swapped
    assert all("lic_fast" not in key for module in model.modules() for key in vars(module))
    assert [*state] == [*model.state_dict()]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_restore_removes_what_was_kept_in_the_instances():
    model = made("mbt2018-mean").eval()
    lic_fast.accelerate(model, verbose=False)
    with_torch_noise(model)(image())
    compress(model, image())
    fields = set(vars(stock.EntropyBottleneck(3)))
    assert set(vars(model.entropy_bottleneck)) > fields
    lic_fast.restore(model)
    assert set(vars(model.entropy_bottleneck)) == fields
    assert type(pickle.loads(pickle.dumps(model)).entropy_bottleneck) is stock.EntropyBottleneck


class Quiet(stock.EntropyBottleneck):
    """A user's own subclass."""


class Users(nn.Module):
    """A user's model of CompressAI's layers, two of them shared."""

    def __init__(self):
        super().__init__()
        self.gdn = GDN(4)
        self.first = stock.EntropyBottleneck(4)
        self.again = nn.ModuleList([self.first, Quiet(4)])
        self.mixture = stock.GaussianMixtureConditional(K=2)

    def forward(self, x):
        return self.again[0](self.gdn(x))


def test_users_models_and_subclasses():
    model = Users()
    report = lic_fast.accelerate(model, verbose=False, only=["entropy_bottleneck", "gaussian_mixture_conditional"])
    assert [(e.path, e.kind) for e in report.swapped] == [
        ("first", "EntropyBottleneck"),
        ("mixture", "GaussianMixtureConditional"),
    ]
    assert [(e.path, e.kind) for e in report.kept] == [("again.1", "Quiet")]
    assert "subclass of EntropyBottleneck" in report.kept[0].reason
    assert model.first is model.again[0] and type(model.first) is entropy.EntropyBottleneck
    assert type(model.again[1]) is Quiet and type(model.gdn) is GDN
    alone = stock.EntropyBottleneck(3)
    assert [entry.path for entry in lic_fast.accelerate(alone, verbose=False).swapped] == [""]
    assert type(alone) is entropy.EntropyBottleneck


def test_report(capsys):
    report = lic_fast.accelerate(made("mbt2018-mean").to(torch.bfloat16))
    printed = capsys.readouterr().out
    assert printed == f"lic_fast.accelerate: {report}\n"
    assert "EntropyBottleneck x 1: entropy_bottleneck" in printed
    chosen = lic_fast.explain("factorized_rate", "cpu", torch.bfloat16).chosen
    assert f"factorized_rate on cpu, torch.bfloat16: {chosen}" in printed
    lic_fast.accelerate(stock.GaussianConditional(None))  # no parameters, and tables of integers
    assert (
        f"mixture_rate on cpu, torch.float32: {lic_fast.explain('mixture_rate', 'cpu').chosen}"
        in capsys.readouterr().out
    )
    nothing = lic_fast.accelerate(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert not nothing.swapped and not nothing.kept and "nothing to swap" in capsys.readouterr().out
    lic_fast.accelerate(made("mbt2018-mean"), verbose=False)
    assert capsys.readouterr().out == ""


def test_wrong_arguments():
    for call in (lic_fast.accelerate, lic_fast.restore):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
            call({})
    model = made("mbt2018-mean")
    with pytest.raises(ValueError, match=r"only must name some of .*gdn.*, got 'gdm'"):
        lic_fast.accelerate(model, only=["gdn", "gdm"])
    assert type(model.entropy_bottleneck) is stock.EntropyBottleneck
    assert not lic_fast.accelerate(model, only=[], verbose=False).swapped
    assert [e.path for e in lic_fast.accelerate(model, only="entropy_bottleneck", verbose=False).swapped] == [
        "entropy_bottleneck"
    ]
    assert set(patch.KINDS) >= {"gaussian_conditional", "entropy_bottleneck", "gdn", "autoregressive"}


@some_models
def test_copies_pickles_and_state_dicts(name):
    theirs = made(name).eval()
    ours, _ = accelerated(theirs)
    x, expected = image(), theirs(image())["likelihoods"]
    compress(ours, x)  # with tables and a coder
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    fresh = MODELS[name]().eval()
    fresh.load_state_dict(ours.state_dict())
    lic_fast.accelerate(fresh, verbose=False)
    other, _ = accelerated(MODELS[name]().eval())
    other.load_state_dict(ours.state_dict())
    back = MODELS[name]().eval()
    back.load_state_dict(other.state_dict())
    for model in (copy.deepcopy(ours), torch.load(file, weights_only=False), fresh, other, back):
        for key, value in model(x)["likelihoods"].items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
        assert compress(model, x)["strings"] == compress(ours, x)["strings"]
    assert all(type(a) is type(b) for a, b in zip(copy.deepcopy(ours).modules(), ours.modules(), strict=True))


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "bmshj2018-hyperprior"])
def test_aux_loss_and_training(name):
    theirs = made(name)
    ours, _ = accelerated(theirs)
    with_torch_noise(ours)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            out = model(image())
            loss = sum(p.log().mean() for p in out["likelihoods"].values()).neg() + out["x_hat"].square().mean()
            (loss + 1e-3 * model.aux_loss()).backward()
            optimizer.step()
        losses.append((loss.detach(), model.aux_loss().detach()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_tables_follow_training_without_update():
    model = made("mbt2018-mean")
    lic_fast.accelerate(model, verbose=False)
    first = compress(model.eval(), image())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2):
        (model.train()(image())["likelihoods"]["z"].log().sum().neg() + model.aux_loss()).backward()
        optimizer.step()
    coded = compress(model.eval(), image())
    fresh = copy.deepcopy(model)
    lic_fast.restore(fresh)
    fresh.update(force=True)
    assert coded["strings"] == compress(fresh, image())["strings"] != first["strings"]
    assert entropy.solve_quantiles(model) == 1 and model.aux_loss() < 0.1


def test_half_models():
    model = made("mbt2018-mean").eval()
    lic_fast.accelerate(model, verbose=False)
    with torch.no_grad():
        exact = model(image())["likelihoods"]
        out = model.bfloat16()(image().bfloat16())
    assert out["x_hat"].dtype is torch.bfloat16
    for key, value in out["likelihoods"].items():
        assert value.dtype is torch.float32 and bool(torch.isfinite(value.log()).all())
        assert (value.log().mean() - exact[key].log().mean()).abs() < 0.1
    assert compress(model, image().bfloat16())["strings"]


def test_compiled_models_before_and_after():
    theirs = made("bmshj2018-factorized-relu").eval()
    expected = theirs(image())["likelihoods"]["y"]
    before, after = copy.deepcopy(theirs), copy.deepcopy(theirs)
    torch._dynamo.reset()
    lic_fast.accelerate(before, verbose=False)
    first = torch.compile(before, fullgraph=True, backend="aot_eager")
    second = torch.compile(after, backend="aot_eager")
    second(image())
    report = lic_fast.accelerate(second, verbose=False)
    assert [entry.path for entry in report.swapped] == ["entropy_bottleneck"]
    assert type(after.entropy_bottleneck) is entropy.EntropyBottleneck
    for compiled in (first, second):
        torch.testing.assert_close(compiled(image())["likelihoods"]["y"], expected, rtol=1e-4, atol=1e-6)
    assert lic_fast.restore(second).swapped


@pytest.fixture
def process_group():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_models_before_and_after(process_group):
    theirs = made("mbt2018-mean")
    for early in (True, False):
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(theirs), find_unused_parameters=True)
        if early:
            loss_and_gradients(wrapped.module, image())
        report = lic_fast.accelerate(wrapped, verbose=False)
        assert {"entropy_bottleneck", "gaussian_conditional"} <= {entry.path for entry in report.swapped}
        with_torch_noise(wrapped)
        expected = copy.deepcopy(theirs)
        for model in (wrapped, expected):
            torch.manual_seed(0)
            model(image())["likelihoods"]["y"].log().sum().neg().backward()
        for a, b in zip(wrapped.module.parameters(), expected.parameters(), strict=True):
            if b.grad is not None:
                assert (a.grad - b.grad).abs().max() <= 1e-3 * b.grad.abs().max() + 1e-7

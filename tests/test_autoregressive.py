"""lic_fast.entropy.autoregressive against CompressAI's own loops: the same bytes, the same latents, to the bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lic_fast.coding

pytest.importorskip("compressai")
from compressai.entropy_models import GaussianConditional
from compressai.latent_codecs import RasterScanLatentCodec
from compressai.layers import MaskedConv2d
from compressai.models import Cheng2020Anchor, Cheng2020Attention, JointAutoregressiveHierarchicalPriors

from lic_fast.entropy import _coder, autoregressive
from lic_fast.entropy.autoregressive import accelerated, why_not

MODELS = {
    "mbt2018": lambda: JointAutoregressiveHierarchicalPriors(8, 12),
    "mbt2018, 36 channels": lambda: JointAutoregressiveHierarchicalPriors(8, 36),
    "cheng2020-anchor": lambda: Cheng2020Anchor(8),
    "cheng2020-attn": lambda: Cheng2020Attention(8),
}


def lively(model):
    """Weights at which latents and scales differ from pixel to pixel."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.weight.mul_(1.5)
                module.bias.normal_(generator=g, std=0.3)
        model.entropy_parameters[-1].weight.mul_(3)
        if hasattr(model, "g_a"):
            [m for m in model.g_a.modules() if isinstance(m, nn.Conv2d)][-1].weight.mul_(20)
    return model.eval()


def build(name):
    torch.manual_seed(3)
    model = lively(MODELS[name]())
    model.update()
    return model


def picture(count=1, height=64, width=128):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def codec():
    torch.manual_seed(5)
    m = 12
    network = nn.Sequential(nn.Conv2d(4 * m, 40, 1), nn.LeakyReLU(inplace=True), nn.Conv2d(40, 2 * m, 1))
    made = RasterScanLatentCodec(GaussianConditional(None), network, MaskedConv2d(m, 2 * m, kernel_size=5, padding=2))
    made.gaussian_conditional.update_scale_table([0.11 * 1.13**i for i in range(64)])
    return lively(made)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["no_grad", "grad"])
@pytest.mark.parametrize("threads", [1, 2])
def test_streams_and_pictures_are_those_of_the_stock_class(name, mode, threads):
    model = build(name)
    kind = type(model)
    torch.set_num_threads(threads)
    try:
        with torch.set_grad_enabled(mode == "grad"):
            stock = model.compress(picture(2))
            model.__class__ = accelerated(kind)
            ours = model.compress(picture(2))
            decoded = model.decompress(stock["strings"], stock["shape"])["x_hat"]
            model.__class__ = kind
            expected = model.decompress(ours["strings"], ours["shape"])["x_hat"]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(2)
    assert min(map(len, stock["strings"][0])) > 300
    assert ours["strings"] == stock["strings"] and ours["shape"] == stock["shape"]
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("fast_context", [True, False])
def test_latents_are_those_of_the_stock_class(fast_context, monkeypatch):
    if not fast_context:  # as on a processor on which oneDNN adds in another order
        monkeypatch.setattr(autoregressive, "context_conv", lambda crop, weight, packed, bias: crop.new_zeros(()))
    made, g = codec(), torch.Generator().manual_seed(6)
    y, params = 9 * torch.randn(2, 12, 6, 7, generator=g), torch.randn(2, 24, 6, 7, generator=g)
    with torch.no_grad():
        stock = made.compress(y, params)
        made.__class__ = accelerated(RasterScanLatentCodec)
        ours = made.compress(y, params)
        streams = [[string for (string,) in stock["strings"]]]
        decoded = made.decompress(streams, stock["shape"], params)["y_hat"]
        made.__class__ = RasterScanLatentCodec
        expected = made.decompress(streams, stock["shape"], params)["y_hat"]
    assert ours["strings"] == stock["strings"] and ours["shape"] == stock["shape"]
    assert torch.equal(ours["y_hat"], stock["y_hat"])
    assert torch.equal(decoded, expected) and torch.equal(decoded, stock["y_hat"])
    assert not decoded.is_inference() and len(set(decoded.flatten().tolist())) > 500


def test_native_context_is_used_where_it_has_the_bits_of_onednn():
    if lic_fast.explain("context_conv", "cpu").chosen != "cpp":
        pytest.skip("the native library is missing")
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("oneDNN adds in the order of the kernel on AVX-512 alone")
    model = build("mbt2018, 36 channels")
    weight = model.context_prediction.weight.detach()
    y_hat, params = torch.zeros(1, 36, 8, 8), torch.zeros(1, 72, 4, 4)
    with torch.inference_mode():
        model.__class__ = accelerated(type(model))
        assert model._lic_fast_pixels(y_hat, params, weight, False)()._packed is not None
        # an encoder's y is not zero where the mask is: weights that are not masked must not be left out
        assert model._lic_fast_pixels(y_hat, params, weight + 1, True)()._packed is None
        weight[0, 0, 4, 4] = torch.inf
        assert model._lic_fast_pixels(y_hat, params, weight, False)()._packed is None


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_without_the_native_library(backend, monkeypatch):
    model = build("mbt2018")
    with torch.no_grad():
        stock = model.compress(picture(1, 64, 64))
        expected = model.decompress(stock["strings"], stock["shape"])["x_hat"]
        model.__class__ = accelerated(type(model))
        if backend == "auto":
            monkeypatch.setattr(lic_fast._native, "why_not", lambda *_: "it is not built")
            for op in ("ans_coder_encode", "ans_coder_decode_", "context_conv"):
                monkeypatch.setattr(lic_fast._dispatch.OPS[op], "_choices", {})
        with lic_fast.use_backend(backend):
            assert model.compress(picture(1, 64, 64))["strings"] == stock["strings"]
            assert torch.equal(model.decompress(stock["strings"], stock["shape"])["x_hat"], expected)


def test_tables_are_prepared_once(monkeypatch):
    model, made = build("mbt2018"), []
    lic_fast.accelerate(model, verbose=False)
    init = _coder.Coder.__init__
    monkeypatch.setattr(_coder.Coder, "__init__", lambda self, of: (made.append(of), init(self, of))[1])
    with torch.no_grad():
        for _ in range(2):
            out = model.compress(picture(1, 64, 64))
            model.decompress(out["strings"], out["shape"])
        assert len(made) == 2 and {*made} == {model.gaussian_conditional, model.entropy_bottleneck}
        model.gaussian_conditional.update()
        assert model.compress(picture(1, 64, 64))["strings"] == out["strings"] and len(made) == 3


def test_instances_pickle_copy_and_go_back():
    model = build("mbt2018")
    kind, before = type(model), {k: v.clone() for k, v in model.state_dict().items()}
    fields = set(vars(model))
    fast = accelerated(kind)
    assert fast is accelerated(kind) and issubclass(fast, kind) and fast.__name__ == kind.__name__
    model.__class__ = fast
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        stream = model.compress(picture(1, 64, 64))
        for other in copies:
            assert type(other) is fast and set(vars(other)) == fields
            assert other.compress(picture(1, 64, 64))["strings"] == stream["strings"]
    model.__class__ = kind
    assert type(model) is kind and set(vars(model)) == fields and repr(model) == repr(copies[0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(copies[0].state_dict()) == list(before)


class Renamed(JointAutoregressiveHierarchicalPriors):
    """A user's subclass that leaves the loops alone."""


class Overridden(JointAutoregressiveHierarchicalPriors):
    """A user's subclass with a loop of its own."""

    def _decompress_ar(self, *args):
        raise AssertionError


def test_subclasses():
    torch.manual_seed(0)
    model = Renamed(8, 12).eval()
    model.__class__ = accelerated(Renamed)
    assert type(pickle.loads(pickle.dumps(model))) is accelerated(Renamed)
    assert why_not(Renamed) is None
    for kind, message in (
        (Overridden, "Overridden overrides _decompress_ar"),
        (nn.Linear, "Linear has no serial coding"),
        (accelerated(Renamed), "Renamed is accelerated already"),
    ):
        assert message in why_not(kind)
        with pytest.raises(TypeError, match=message):
            accelerated(kind)


def test_a_gaussian_conditional_of_the_users_own_is_called():
    class Coarser(GaussianConditional):
        def build_indexes(self, scales):
            return super().build_indexes(scales) // 2

    model = build("mbt2018")
    model.gaussian_conditional.__class__ = Coarser
    with torch.no_grad():
        stock = model.compress(picture(1, 64, 64))
        model.__class__ = accelerated(type(model))
        assert model.compress(picture(1, 64, 64))["strings"] == stock["strings"]


@pytest.mark.parametrize("threads", [1, 2])
def test_errors_leave_the_number_of_threads(threads):
    model = build("mbt2018")
    model.__class__ = accelerated(type(model))
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            out = model.compress(picture(1, 64, 64))
            (y, z), shape = out["strings"], out["shape"]
            # by name: where nothing is built, CompressAI's coder would read beyond the end
            by_name = lic_fast.use_backend(lic_fast.explain("ans_coder_decode_", "cpu", torch.int32).chosen)
            with by_name, pytest.raises(lic_fast.coding.BitstreamError):
                model.decompress([[y[0][:40]], z], shape)
            assert torch.get_num_threads() == threads
            calls = []

            def fail(*_):
                calls.append(torch.get_num_threads())
                if len(calls) == 5:
                    raise KeyboardInterrupt

            model.entropy_parameters.register_forward_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                model.decompress([y, z], shape)
        assert torch.get_num_threads() == threads and calls[-1] == 1
    finally:
        torch.set_num_threads(2)

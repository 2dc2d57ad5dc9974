"""MSP's decoding on a GPU: no step waits, and an image is one CUDA graph. What needs no GPU: test_msp_graphs.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import usable

pytest.importorskip("compressai")

from msp_models import KINDS, SHAPES, SMALL, images, kinds, small

from lic_fast import _dispatch
from lic_fast.codec import MSPCodec
from lic_fast.coding import BitstreamError

pytestmark = pytest.mark.skipif(
    ("cuda", "cuda") not in usable("rans_coder_reconstruct_"), reason="no CUDA device, or no CUDA library"
)


@pytest.mark.parametrize("sides", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cuda_graphs_decode_what_the_steps_do(kind, sides) -> None:
    model = small(**kind).cuda()
    model.lanes = 64
    coded = [(model.compress(y.cuda()), model(y.cuda(), False)[0]) for y in images(4, *sides)]
    for graph in (False, True):
        model.cuda_graph = graph
        for strings, expected in coded * 2:
            assert torch.equal(model.decompress(strings, sides), expected)
    (recorded,) = model._graphs._kinds.values()
    assert recorded.recording is not None
    if "portable" in kind:
        model.cpu()
        assert all(torch.equal(model.decompress(strings, sides), expected.cpu()) for strings, expected in coded)


@pytest.mark.parametrize("kind", [{"portable": True}, {"mixture": 3}], ids=["portable", "mixture"])
def test_a_gpu_without_a_coder_decodes_by_that_of_the_cpu(kind, monkeypatch) -> None:
    model, sides = small(**kind).cuda(), (9, 16)
    y = images(1, *sides)[0].cuda()
    expected = model(y, False)[0]
    strings = model.compress(y)
    coder = _dispatch.OPS["rans_coder_reconstruct_"]
    missing = dataclasses.replace(coder.impls["cuda"], why_not=lambda device: "it is not built")
    monkeypatch.setitem(coder.impls, "cuda", missing)
    if "mixture" in kind:  # whose integers hang on where the softmax is computed
        strings = model.compress(y)
    for _ in range(3):
        assert torch.equal(model.decompress(strings, sides), expected)
    assert not model._graphs._kinds


def test_no_step_waits_for_the_gpu() -> None:
    model = small(portable=True).cuda()
    strings = model.compress(images(1, 9, 16)[0].cuda())
    model.cuda_graph = False
    model.decompress(strings, (9, 16))
    coded, seen = model._coded, []

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            coded(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.append(arguments)

    model._coded = watched
    model.decompress(strings, (9, 16))
    assert len(seen) == 1


def test_a_codec_decodes_by_one_cuda_graph() -> None:
    torch.manual_seed(0)
    codec = MSPCodec(4, 5, profile=SMALL).cuda().eval()
    codec.update()
    codec.make_portable(torch.rand(1, 3, 128, 128, device="cuda"))
    coded = [codec.compress(torch.rand(1, 3, 80, 48, device="cuda")) for _ in range(3)]
    codec.entropy_model.cuda_graph = False
    expected = [codec.decompress(**each)["x_hat"] for each in coded]
    codec.entropy_model.cuda_graph = True
    for each, x_hat in list(zip(coded, expected, strict=True)) * 3:
        torch.testing.assert_close(codec.decompress(**each)["x_hat"], x_hat)
    (kind,) = kinds(codec)
    assert kind.recording is not None
    codec.g_s.to("cpu").to("cuda")
    for each, x_hat in zip(coded, expected, strict=True):
        torch.testing.assert_close(codec.decompress(**each)["x_hat"], x_hat)


def test_a_cuda_graph_returns_no_noise() -> None:
    model, other = small().cuda(), small().cuda()
    with torch.no_grad():
        other.network.heads[1].parameters_of.bias.mul_(1.5)
    y = images(1, 9, 16)[0].cuda()
    strings, foreign = model.compress(y), other.compress(y)
    expected = [model.decompress(strings, (9, 16)) for _ in range(2)][-1]
    for _ in range(2):
        with pytest.raises(BitstreamError, match="are not those of the encoder"):
            model.decompress(foreign, (9, 16))
        assert torch.equal(model.decompress(strings, (9, 16)), expected)

"""MSP's decoding as one piece of work of a device: nothing is read on the host before its end, and it can be replayed.

Without a GPU a recording is that of the calls of PyTorch's ops: a replay makes them again on the same tensors, as a
CUDA graph launches the same kernels on the same addresses. Whatever work takes from the host is then as it was when it
was recorded, so that a wrong replay shows.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("compressai")

from msp_models import KINDS, SHAPES, SMALL, images, kinds, small

from lic_fast import _dispatch, use_backend
from lic_fast.codec import MSPCodec
from lic_fast.coding import BitstreamError
from lic_fast.entropy import MSPEntropyModel, _msp_decoding, _msp_graphs
from lic_fast.entropy._msp_coding import coder_device


class Calls(TorchDispatchMode):
    """The calls of ops, in order. Refuses to read a number on the host, but from `allowed`: on the CPU, and only there,
    decoders look at the status of their step at once."""

    def __init__(self, allowed: torch.Tensor) -> None:
        super().__init__()
        self.made, self._allowed = [], allowed.untyped_storage().data_ptr()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            assert args[0].untyped_storage().data_ptr() == self._allowed, "a value is read on the host"
        out = op(*args, **(kwargs or {}))
        self.made.append((op, args, kwargs or {}, out))
        return out


class Recording:
    """Stands in for that of _msp_graphs."""

    made = 0

    def __init__(self, work, slots, device, beside) -> None:
        type(self).made += 1
        before = slots._memory.clone()
        with Calls(slots._memory) as calls:
            self._made = work(slots)
        self._calls = calls.made
        slots._memory.copy_(before)  # a capture runs nothing

    def replay(self):
        for op, args, kwargs, out in self._calls:
            again = op(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self._made


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on the CPU; how often work was recorded. On one thread: a replay does not know that networks want one."""
    monkeypatch.setattr(Recording, "made", 0)
    monkeypatch.setattr(_msp_graphs, "Recording", Recording)
    monkeypatch.setattr(_msp_decoding, "graphs_apply", lambda model, device: model.cuda_graph)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Recording
    torch.set_num_threads(before)


@pytest.mark.parametrize("sides", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_recording_decodes_other_images_of_its_shape(graphs, kind, sides) -> None:
    model = small(**kind)
    coded = [(model.compress(y), model(y, False)[0]) for y in images(4, *sides)]
    decoded = [model.decompress(strings, sides) for strings, _ in coded]
    assert graphs.made == 1 and len(model._graphs._kinds) == 1
    for y_hat, (_, expected) in zip(decoded, coded, strict=True):
        assert torch.equal(y_hat, expected), "and is not overwritten by the next image"
    batch = model.decompress([strings[0] for strings, _ in coded], sides)
    assert graphs.made == 1 and torch.equal(batch, torch.cat([expected for _, expected in coded]))


def test_the_pixels_are_of_the_same_recording(graphs) -> None:
    torch.manual_seed(0)
    codec = MSPCodec(4, 5, profile=SMALL).eval()
    codec.update()
    pictures = [torch.rand(1, 3, 80, 48, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    coded = [codec.compress(x) for x in pictures]
    codec.entropy_model.cuda_graph = False
    expected = [codec.decompress(**each)["x_hat"] for each in coded]
    assert graphs.made == 0
    codec.entropy_model.cuda_graph = True
    for each, x_hat in zip(coded, expected, strict=True):
        assert torch.equal(codec.decompress(**each)["x_hat"], x_hat)
    assert graphs.made == 1 and all(kind.recording._made[0].shape == (1, 3, 80, 48) for kind in kinds(codec))
    both = codec.compress(torch.cat(pictures[:2]))
    codec.decompress(**both), codec.decompress(**both)
    assert any(kind.recording._made[0].shape == (1, 5, 5, 3) for kind in kinds(codec)), (
        "a batch's pixels are made at once"
    )
    codec.tile = 2  # other tiles are other work
    made = graphs.made
    tiled = [codec.decompress(**coded[0])["x_hat"] for _ in range(3)]
    assert graphs.made == made + 1 and torch.equal(tiled[0], tiled[2])
    torch.testing.assert_close(tiled[0], expected[0])
    own = MSPCodec.around(codec.g_a, codec.g_s, 5, profile=SMALL).eval()
    own.entropy_model.load_state_dict(codec.entropy_model.state_dict())
    for each, x_hat in zip(coded, expected, strict=True):
        assert torch.equal(own.decompress(**each)["x_hat"], x_hat)
    assert kinds(own)[0].recording._made[0].shape == (1, 5, 5, 3), "modules of others may read on the host"


def changed(model: MSPEntropyModel, what: str) -> None:
    if what == "in place":
        with torch.no_grad():
            model.network.heads[0].parameters_of.bias += 0.25
    elif what == "moved":
        model.double().float()
    elif what == "loaded":
        model.load_state_dict(small(seed=3).state_dict())
    elif what == "a layer":
        model.network.heads[1].hidden[0] = torch.nn.Conv2d(8, 8, 1)
    else:
        with torch.no_grad():
            model.bottleneck.quantiles += 1.0


@pytest.mark.parametrize("what", ["in place", "moved", "loaded", "a layer", "medians"])
def test_changed_weights_void_a_recording(graphs, what: str) -> None:
    model = small()
    (y,) = images(1, 7, 5)
    strings = model.compress(y)
    for _ in range(3):
        model.decompress(strings, (7, 5))
    assert graphs.made == 1
    changed(model, what)
    strings, expected = model.compress(y), model(y, False)[0]
    for made in (1, 2, 2):
        assert torch.equal(model.decompress(strings, (7, 5)), expected)
        assert graphs.made == made


def test_a_longer_stream_than_all_before_makes_new_room(graphs, monkeypatch) -> None:
    monkeypatch.setattr(_msp_graphs, "_LEAST_ROOM", 1)
    model = small()
    quiet, loud = model.compress(torch.zeros(1, 5, 16, 16))[0], model.compress(3000 * images(1, 16, 16)[0])[0]
    assert len(loud) > 2 * len(quiet)
    rooms = []
    for stream in (quiet, quiet, loud, quiet, loud, quiet):
        expected = model.decompress([stream, stream], (16, 16))  # twice: once it is void, it is made anew at once
        assert torch.equal(expected[0], expected[1])
        (kind,) = model._graphs._kinds.values()
        rooms.append(kind.slots.rooms[0])
    assert rooms[0] == rooms[1] < rooms[2] == rooms[5] and graphs.made == 2
    with torch.no_grad():
        model.network.biases += 0.5
    quiet = model.compress(torch.zeros(1, 5, 16, 16))[0]
    model.decompress([quiet], (16, 16))
    (kind,) = model._graphs._kinds.values()
    assert kind.slots.rooms[0] == rooms[2], "other weights take no room away"


def test_the_last_few_kinds_are_kept(graphs) -> None:
    model = small()
    coded = {(3, w): model.compress(images(1, 3, w)[0]) for w in range(1, 7)}
    for sides in [(3, 1), (3, 2), (3, 3), (3, 4), (3, 1), (3, 5), (3, 6)]:
        model.decompress(coded[sides], sides)
    assert [key[0] for key in model._graphs._kinds] == [(3, 4), (3, 1), (3, 5), (3, 6)] and graphs.made == 1


def test_copies_and_pickles_have_no_recordings(graphs) -> None:
    model = small()
    strings = model.compress(images(1, 7, 5)[0])
    expected = [model.decompress(strings, (7, 5)) for _ in range(3)][-1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._graphs._kinds and other._graphs._lock is not model._graphs._lock
        assert torch.equal(other.decompress(strings, (7, 5)), expected)


def test_what_a_replay_decodes_wrongly_is_an_error(graphs) -> None:
    """Containers that are whole, of an encoder with other weights: what the replay gives is never returned."""
    model, other = small(), small()
    with torch.no_grad():
        other.network.heads[1].parameters_of.bias.mul_(1.5)
    y = images(1, 9, 16)[0]
    strings, foreign = model.compress(y), other.compress(y)
    expected = [model.decompress(strings, (9, 16)) for _ in range(2)][-1]
    for _ in range(2):
        with pytest.raises(BitstreamError, match="parameters of grid 1 are not those of the encoder"):
            model.decompress(foreign, (9, 16))
        assert torch.equal(model.decompress(strings, (9, 16)), expected)
    assert graphs.made == 1
    for at in (2, 3, 6):  # the check alone is damaged
        damaged = bytearray(strings[0])
        damaged[at] ^= 0x40
        with pytest.raises(BitstreamError, match="are not those of the encoder"):
            model.decompress([bytes(damaged)], (9, 16))


def test_a_replay_that_uses_less_than_the_stream_is_an_error(graphs) -> None:
    """Where all levels agree, the coder's own end has the last word."""
    model = small()
    strings = [model.compress(y)[0] for y in images(2, 1, 1)]  # all in the step that has no levels
    for stream in (strings[0], strings[0], strings[1]):
        model.decompress([stream], (1, 1))
    (kind,) = model._graphs._kinds.values()
    load_ = kind.slots.load_

    def worn_out(decoders):
        load_(decoders)
        decoders = kind.slots.decoders
        decoders[0]._state[32 + 1] += 7  # words left of the first stream

    kind.slots.load_ = worn_out
    with pytest.raises(BitstreamError, match="do not end where the stream does"):
        model.decompress([strings[0]], (1, 1))


def test_what_is_asked_of_cuda(monkeypatch) -> None:
    """A graph of the model's device, on a stream of its own, in the pool of the one before it."""
    asked = []

    class Graph:
        def replay(self):
            asked.append("replay")

        def pool(self):
            return id(self)

    @contextlib.contextmanager
    def noted(*arguments):
        asked.append(arguments)
        yield

    for name, fake in (("CUDAGraph", Graph), ("graph", noted), ("device", noted), ("Stream", str)):
        monkeypatch.setattr(torch.cuda, name, fake)
    work = lambda slots: (slots, "log")  # noqa: E731
    first = _msp_graphs.Recording(work, "a", torch.device("cuda:1"), None)
    second = _msp_graphs.Recording(work, "b", torch.device("cuda:1"), first)
    assert first.replay() == ("a", "log") and second.replay() == ("b", "log")
    stream = ("cuda:1", "thread_local")
    assert asked == [
        (torch.device("cuda:1"),), (first._graph, None, *stream), (torch.device("cuda:1"),),
        (second._graph, first._graph.pool(), *stream), "replay", "replay",
    ]  # fmt: skip


def test_graphs_are_for_gpus_outside_of_autocast(monkeypatch) -> None:
    model = small()
    monkeypatch.setattr(_msp_decoding, "coder_device", lambda device: device)
    applies = functools.partial(_msp_decoding.graphs_apply, model)
    assert applies(torch.device("cuda")) and not applies(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not applies(torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(_msp_decoding, "coder_device", lambda device: torch.device("cpu"))
        assert not applies(torch.device("cuda"))
    model.cuda_graph = False
    assert not applies(torch.device("cuda"))


@dataclasses.dataclass(frozen=True)
class Waits:
    """Reads what it makes on the host."""

    def __call__(self, y_hat):
        return y_hat * float(y_hat.abs().max())

    def modules(self):
        return iter(())


def test_work_that_reads_on_the_host_is_noticed(graphs) -> None:
    """This file's stand-in would let none of it pass."""
    model = small()
    strings = model.compress(images(1, 3, 3)[0])
    model.decompress(strings, (3, 3), then=Waits())
    with pytest.raises(AssertionError, match="read on the host"):
        model.decompress(strings, (3, 3), then=Waits())


@pytest.mark.parametrize("lanes", [1, 64, 256])
def test_streams_of_any_lanes_decode(lanes: int) -> None:
    model = small()
    model.lanes = lanes
    y = images(1, 9, 16)[0]
    assert torch.equal(model.decompress(model.compress(y), (9, 16)), model(y, False)[0])


def test_the_cpu_codes_where_the_gpu_cannot(monkeypatch) -> None:
    gpu, coder = torch.device("cuda", 0), _dispatch.OPS["rans_coder_reconstruct_"]
    assert coder_device(torch.device("cpu")) == torch.device("cpu")
    for reason, where in ((None, gpu), ("it is not built", torch.device("cpu"))):
        impl = dataclasses.replace(coder.impls["cuda"], why_not=lambda device, reason=reason: reason)
        monkeypatch.setitem(coder.impls, "cuda", impl)
        assert coder_device(gpu) == where
        with use_backend("reference"):
            assert coder_device(gpu) == torch.device("cpu")

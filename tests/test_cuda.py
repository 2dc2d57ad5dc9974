"""What only a GPU can show: the current stream, CUDA graphs, many more tensors than one table holds."""

from __future__ import annotations

import pytest
import torch

import lic_fast
from lic_fast.functional import affine_reconstruct_, sma_update_, stdet_adam_step_

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

BACKENDS = [b for b in ("cuda", "triton") if lic_fast.explain("sma_update_", "cuda").reasons[b] is None]
STDET_BACKENDS = [b for b in ("cuda", "triton") if lic_fast.explain("stdet_adam_step_", "cuda").reasons[b] is None]


def lists(count=40, size=5000):
    slow = [torch.randn(size + i, device="cuda") for i in range(count)]
    return slow, [s + 0.1 * torch.randn_like(s) for s in slow]


def expected(slow, fast):
    return [s + 0.8 * (f - s) for s, f in zip(slow, fast, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_on_the_current_stream(backend):
    slow, fast = lists()
    want = expected([s + 1 for s in slow], fast)
    stream = torch.cuda.Stream()
    with lic_fast.use_backend(backend), torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(200_000_000)  # a launch on the default stream would run before this ends
        torch._foreach_add_(slow, 1.0)
        sma_update_(slow, fast, alpha=0.8)
    stream.synchronize()
    for s, w in zip(slow, want, strict=True):
        torch.testing.assert_close(s, w, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_a_cuda_graph(backend):
    slow, fast = lists()
    k, d = [torch.rand_like(s) for s in slow], [torch.rand_like(s) for s in slow]
    mode = [torch.randint(0, 10, s.shape, device="cuda", dtype=torch.uint8) for s in slow]
    refs = torch.randn(10, device="cuda")
    backup = [s.clone() for s in slow], [f.clone() for f in fast]

    def work():
        sma_update_(slow, fast, alpha=0.8)
        affine_reconstruct_(fast, k, d, mode, refs)

    with lic_fast.use_backend(backend):
        work()  # compiles, and keeps the tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        for tensors, kept in zip((slow, fast), backup, strict=True):
            torch._foreach_copy_(tensors, kept)
        graph.replay()
    torch.cuda.synchronize()
    for s, w in zip(slow, expected(*backup), strict=True):
        assert torch.equal(s, w)
    for f, *item in zip(fast, k, d, mode, strict=True):
        assert torch.equal(f, item[0] * refs[item[2].long()] + item[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_tensors_than_one_table_holds(backend):
    slow, fast = lists(3000, 3)
    want = expected(slow, fast)
    with lic_fast.use_backend(backend):
        sma_update_(slow, fast, alpha=0.8)
    assert all(torch.equal(s, w) for s, w in zip(slow, want, strict=True))


def test_compiled_with_reduce_overhead():
    w, k, d = (torch.randn(4096, device="cuda") for _ in range(3))
    mode = torch.randint(0, 10, (4096,), device="cuda", dtype=torch.uint8)
    refs = torch.randn(10, device="cuda")

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def step(w, k, d, refs):
        return lic_fast.functional.affine_reconstruct(w, k, d, mode, refs) * 2

    for _ in range(4):
        out = step(w, k, d, refs).clone()
    assert torch.equal(out, (k * refs[mode.long()] + d) * 2)


@pytest.mark.parametrize("settings", [{}, {"stagger": True, "precondition_frequency": 4}], ids=str)
def test_soap_recorded_as_graphs_takes_the_steps_of_eager(settings):
    from soap_training import give_gradients

    from lic_fast.optim import SOAP

    shapes = [(64, 32, 3, 3), (96, 64, 1, 1), (192, 96), (64,), (16, 3, 5, 5)]
    lr = torch.tensor(3e-3, device="cuda")
    weights = [torch.randn(shape) for shape in shapes]
    params, twins, host = ([torch.nn.Parameter(w.to(device)) for w in weights] for device in ("cuda", "cuda", "cpu"))
    recorded, eager = SOAP(params, lr=lr, capturable=True, **settings), SOAP(twins, lr=3e-3, **settings)
    for t in range(33):
        give_gradients(params, twins, host, seed=t)
        if t == 20:
            lr.fill_(1e-3)
            eager.param_groups[0]["lr"] = 1e-3
        recorded.step()
        eager.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert recorded._graphs is not None and len(recorded._graphs._recorded) >= 2


def test_an_ordinary_step_of_soap_waits_for_nothing():
    from soap_training import give_gradients

    from lic_fast.optim import SOAP

    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in [(64, 32, 3, 3), (96, 64), (64,)]]
    optimizer = SOAP(params, precondition_frequency=3)
    for t in range(8):
        give_gradients(params, seed=t)
        torch.cuda.synchronize()
        if t >= 6:  # a refresh among them; tables and handles are made by then
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def assert_all_same_bits(args, want):
    from test_triton_stdet import WRITTEN, assert_same_bits

    for name in WRITTEN:
        ours, theirs = args[name], want[name]
        for x, y in zip(*([ours, theirs] if isinstance(ours, list) else [[ours], [theirs]]), strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("backend", STDET_BACKENDS)
def test_a_step_of_an_embedded_model_launches_on_the_current_stream(backend):
    from test_triton_stdet import case, copied

    from lic_fast.reference.stdet import stdet_adam_step_ as reference

    args = case(device="cuda")
    want, late = copied(args, "cpu"), [p.clone() for p in args["params"]]
    reference(*want.values(), 0.8, True)
    torch._foreach_zero_(args["params"])
    stream = torch.cuda.Stream()
    with lic_fast.use_backend(backend), torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(200_000_000)  # a launch on the default stream would run before this ends
        torch._foreach_copy_(args["params"], late)
        stdet_adam_step_(**args, alpha=0.8)
    stream.synchronize()
    assert_all_same_bits(args, want)


@pytest.mark.parametrize("backend", STDET_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_an_embedded_model_inside_a_cuda_graph(backend, dtype):
    from test_triton_stdet import WRITTEN, case, copied

    from lic_fast.reference.stdet import stdet_adam_step_ as reference

    args = case(dtype=dtype, device="cuda")
    before = copied(args)
    with lic_fast.use_backend(backend):
        stdet_adam_step_(**args, alpha=0.8)  # compiles, and keeps the tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stdet_adam_step_(**args, alpha=0.8)
    for name in WRITTEN:
        written, kept = ([x[name]] if torch.is_tensor(x[name]) else x[name] for x in (args, before))
        torch._foreach_copy_(written, kept)
    want = copied(before, "cpu")
    for _ in range(2):  # with the hyperparameters of the capture
        graph.replay()
        reference(*want.values(), 0.8, True)
    torch.cuda.synchronize()
    assert_all_same_bits(args, want)


@pytest.mark.parametrize("backend", STDET_BACKENDS)
def test_an_embedded_model_of_more_tensors_than_one_table_holds(backend):
    from test_triton_stdet import case, copied

    from lic_fast.reference.stdet import stdet_adam_step_ as reference

    args = case(shapes=[(3,), (1030,), (0,)] * 500, modes=60, device="cuda")
    want = copied(args, "cpu")
    reference(*want.values(), 0.8, True)
    with lic_fast.use_backend(backend):
        stdet_adam_step_(**args, alpha=0.8)
    assert_all_same_bits(args, want)


@pytest.mark.parametrize("backend", STDET_BACKENDS)
def test_a_step_of_an_embedded_model_waits_for_nothing(backend):
    from test_triton_stdet import case

    args = case(device="cuda")
    with lic_fast.use_backend(backend):
        stdet_adam_step_(**args, alpha=0.8)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                args["hyper"] = args["hyper"] * 0.9
                args["grads"] = [torch.randn_like(g) for g in args["grads"]]
                stdet_adam_step_(**args, alpha=0.8)
        finally:
            torch.cuda.set_sync_debug_mode("default")

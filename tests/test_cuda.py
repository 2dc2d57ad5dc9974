"""What only a GPU can show: the current stream, CUDA graphs, many more tensors than one table holds."""

from __future__ import annotations

import pytest
import torch

import lic_fast
from lic_fast.functional import affine_reconstruct_, sma_update_

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

BACKENDS = [b for b in ("cuda", "triton") if lic_fast.explain("sma_update_", "cuda").reasons[b] is None]


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

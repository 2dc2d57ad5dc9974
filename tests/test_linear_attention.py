"""lic_fast.functional.linear_attention and linear_attention_context in every backend at hand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import assert_by_rule, backend_parameters

import lic_fast
from lic_fast.functional import linear_attention, linear_attention_context

EVERY_BACKEND = backend_parameters("linear_attention_context")
INTERPRETED = ("cpu", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (B, K, V, *places): one of everything, tiles and their edges, several pieces of the places, without places' axes
SHAPES = [
    (1, 1, 1, 1), (2, 3, 5, 7), (3, 8, 2), (1, 64, 64, 16, 16), (2, 65, 33, 9, 11), (1, 20, 70, 1000),
    (1, 130, 64, 3, 5, 7), (2, 4, 129, 1, 33), (5, 1, 4, 31, 41), (2, 7, 1, 64),
]  # fmt: skip
LARGE = [(1, 64, 64, 96, 128), (2, 192, 192, 24, 17), (1, 384, 384, 8, 8), (16, 40, 24, 33, 3)]
ids = str


def inputs(shape, dtype=torch.float32, device="cpu", seed=0):
    """[k, v, the gradient of the context]; keys spread widely enough that some places outweigh others."""
    g = torch.Generator().manual_seed(seed)
    B, K, V, *places = shape
    k, v, grad = (torch.randn(size, generator=g) for size in ((B, K, *places), (B, V, *places), (B, V, K)))
    return [t.to(device, dtype) for t in (2 * k, v + 0.3, grad)]


def plain(k, v):
    """In k's dtype, by PyTorch's own operations."""
    return torch.einsum("bvn,bkn->bvk", v.reshape(*v.shape[:2], -1), k.reshape(*k.shape[:2], -1).softmax(2))


def with_gradients(function, k, v, grad, dtype=None):
    """[context, d_k, d_v], in `dtype` where it is given; the leaves keep their memory formats."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in (k, v)]
    leaves = [(t if dtype is None else t.to(dtype)).requires_grad_() for t in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def assert_all_by_rule(ours, values):
    eager, exact = with_gradients(plain, *values), with_gradients(plain, *values, dtype=torch.float64)
    if values[0][0, 0].numel() == 1:  # the only place has all the weight: its key moves nothing, but for rounding
        terms = (values[2].double() * exact[0]).abs().sum(1).max()
        assert ours[1].double().abs().max() <= 8 * torch.finfo(ours[1].dtype).eps * terms
        ours, eager, exact = ours[::2], eager[::2], exact[::2]
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert mine.dtype == values[0].dtype
        assert_by_rule(mine, theirs, truth)


@pytest.fixture(autouse=True)
def full_precision():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield
    matmul.fp32_precision = before


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_values_and_gradients_by_the_rule(device, backend, dtype):
    interpreted = (device, backend) == INTERPRETED
    if interpreted and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    if lic_fast.explain("linear_attention_context", device, dtype).reasons[backend]:
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            linear_attention_context(*inputs(SHAPES[0], dtype, device)[:2])
        return
    for seed, shape in enumerate(SHAPES if interpreted else SHAPES + LARGE):
        values = inputs(shape, dtype, device, seed)
        before = [t.clone() for t in values]
        with lic_fast.use_backend(backend):
            ours = with_gradients(linear_attention_context, *values)
        assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))
        assert_all_by_rule(ours, values)


@EVERY_BACKEND
def test_keys_far_from_zero(device, backend):
    """Maxima that rise and fall over the places, keys whose exp would overflow, and shares that are zero in fp32."""
    k, v, grad = inputs((2, 20, 36, 40, 25), device=device)
    slope = torch.linspace(-60, 60, 1000, device=device).reshape(40, 25)
    wave = 40 * torch.sin(slope)
    for keys in (k + slope, k - slope, k + wave, 30 * k, k + 90, k + 1e4, k - 1e4):
        with lic_fast.use_backend(backend):
            ours = with_gradients(linear_attention_context, keys, v, grad)
        eager, exact = (with_gradients(plain, keys, v, grad, dtype=dtype) for dtype in (None, torch.float64))
        for mine, theirs, truth in zip(ours[::2], eager[::2], exact[::2], strict=True):
            assert_by_rule(mine, theirs, truth)
        # where one place outweighs all, d_k is the small difference of two sums that are not
        product = torch.einsum("bvk,bvhw->bkhw", grad.double(), v.double()).abs()
        inner = (grad * exact[0]).sum(1).abs()[:, :, None, None]
        terms = (keys.double().flatten(2).softmax(2).reshape(keys.shape) * (product + inner)).max()
        error, allowed = ((t[1].double() - exact[1]).abs().max() for t in (ours, eager))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * terms


def laid_out(t):
    """The same values in every order of memory that a layer leaves: by name."""
    halves = torch.cat([-t, t, t + 1], 1)
    last = t.to(memory_format=torch.channels_last)
    yield "contiguous", t
    yield "channels last", last
    yield "a part of a convolution's output", halves.chunk(3, 1)[1]
    yield "that, channels last", halves.to(memory_format=torch.channels_last).chunk(3, 1)[1]
    yield "transposed", t.transpose(2, 3).contiguous().transpose(2, 3)
    yield "every other place", torch.stack([t, -t], -1)[..., 0]
    yield "every other channel, channels last", torch.stack([last, -last], 2).flatten(1, 2)[:, ::2]
    yield "batches from a larger one", torch.cat([t, -t], 1).unflatten(1, (2, -1))[:, 0]


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(2, 6, 10, 5, 7), (2, 16, 16, 8, 40)], ids=ids)
def test_layouts(device, backend, shape):
    k, v, grad = inputs(shape, device=device)
    with lic_fast.use_backend(backend):
        expected = with_gradients(linear_attention_context, k, v, grad)
        for (name_k, keys), (name_v, values) in [
            *zip(laid_out(k), laid_out(v), strict=True), *zip(laid_out(k), [*laid_out(v)][::-1], strict=True)
        ]:  # fmt: skip
            assert torch.equal(keys, k) and torch.equal(values, v)
            leaves = [t.detach().requires_grad_() for t in (keys, values)]
            y = linear_attention_context(*leaves)
            found = [y.detach(), *torch.autograd.grad(y, leaves, grad.mT.contiguous().mT)]
            for mine, e in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, e, msg=lambda m, a=name_k, b=name_v: f"{a}, {b}: {m}")
            for leaf, mine in zip((keys, values), found[1:], strict=True):
                last = not leaf.is_contiguous() and leaf.stride(1) == 1
                assert mine.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        wide = torch.cat([k, v], 1).to(memory_format=torch.channels_last).requires_grad_()
        linear_attention_context(*wide.split(shape[1:3], 1)).backward(grad)
        torch.testing.assert_close(wide.grad, torch.cat(expected[1:], 1))
        spread = k[:, :1].expand(-1, shape[1], -1, -1)  # channels that are one and the same memory
        torch.testing.assert_close(linear_attention_context(spread, v), plain(spread, v))


@EVERY_BACKEND
def test_nothing_to_sum(device, backend):
    for dtype in (torch.float32, torch.float16 if backend == "triton" else torch.float64):
        for shape in ((2, 3, 5, 0), (2, 3, 5, 0, 4), (0, 3, 5, 4, 4), (0, 3, 5)):
            k, v, grad = inputs(shape, dtype, device)
            with lic_fast.use_backend(backend):
                y, d_k, d_v = with_gradients(linear_attention_context, k, v, grad)
            assert torch.equal(y, grad.new_zeros(shape[0], 5, 3)) and y.dtype is dtype
            assert d_k.shape == k.shape and d_v.shape == v.shape
    with lic_fast.use_backend(backend):
        statistics = torch.ops.lic_fast.linear_attention_context(*inputs((2, 3, 5, 0), device=device)[:2])[1]
    assert torch.equal(statistics, torch.zeros(2, 2, 3, device=device))


def of_plain(k, v, grad):
    return [t.float() for t in with_gradients(plain, k, v, grad, dtype=torch.float64)]


@EVERY_BACKEND
@pytest.mark.parametrize("last", [False, True])
def test_keys_that_are_not_finite_go_where_softmax_takes_them(device, backend, last):
    k, v, grad = inputs((2, 5, 4, 20, 65), device=device)  # several pieces of the places
    k[0, 0, :9], k[0, 1, 9:], k[0, 2, 3:15, ::2], k[0, 3, :, 1:] = (-torch.inf,) * 4
    cases = [k]
    for place, value in (((1, 2, 7, 3), torch.nan), ((1, 4, 19, 64), torch.inf), ((0, 0, 0, 0), torch.inf)):
        cases.append(k.clone())
        cases[-1][place] = value
    cases.append(k.clone())
    cases[-1][0, 2] = -torch.inf
    cases.append(k.clone())
    cases[-1][0, 2], cases[-1][1, 1] = torch.nan, torch.inf
    for keys in cases:
        keys = keys.to(memory_format=torch.channels_last) if last else keys
        with lic_fast.use_backend(backend):
            ours = with_gradients(linear_attention_context, keys, v, grad)
        for mine, theirs in zip(ours, of_plain(keys, v, grad), strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert ours[0][0, :, 2].isnan().all() and not ours[0][0, :, [0, 1, 3, 4]].isnan().any()


@EVERY_BACKEND
def test_values_that_are_not_finite_stay_in_their_channel(device, backend):
    k, v, _ = inputs((2, 5, 4, 20, 65), device=device)
    v[0, 1, 3, 3], v[0, 2, 19, 64], v[1, 3, 0, 0] = torch.nan, torch.inf, -torch.inf
    with lic_fast.use_backend(backend):
        y = linear_attention_context(k, v)
    torch.testing.assert_close(y, plain(k, v), equal_nan=True)
    assert y[0, 1].isnan().all() and (y[0, 2] == torch.inf).all() and (y[1, 3] == -torch.inf).all()


@EVERY_BACKEND
def test_the_number_of_threads_and_other_samples_change_no_bit(device, backend):
    if (device, backend) == INTERPRETED:
        pytest.skip("the interpreter has one thread")
    before = torch.get_num_threads()
    try:
        for shape in ((3, 48, 37, 41, 37), (1, 64, 64, 128, 65), (2, 200, 130, 5, 5)):
            values, found = inputs(shape, device=device), []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                with lic_fast.use_backend(backend):
                    found.append(with_gradients(linear_attention_context, *values))
            for other in found[1:]:
                if backend != "reference":  # PyTorch's own sums may depend on it
                    assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@EVERY_BACKEND
def test_only_what_needs_a_gradient_gets_one(device, backend):
    values = inputs((2, 9, 4, 6, 5), device=device)
    with lic_fast.use_backend(backend):
        expected = with_gradients(linear_attention_context, *values)[1:]
        for wanted in (0, 1):
            leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(values[:2])]
            linear_attention_context(*leaves).backward(values[2])
            assert leaves[1 - wanted].grad is None and torch.equal(leaves[wanted].grad, expected[wanted])


def test_memory_kept_for_backward():
    k, v, _ = inputs((2, 16, 8, 8, 8))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        linear_attention_context(k.requires_grad_(), v)
    extra = [tuple(t.shape) for t in kept.values() if t.data_ptr() not in (k.data_ptr(), v.data_ptr())]
    assert sorted(extra) == [(2, 2, 16), (2, 8, 16)]


@EVERY_BACKEND
def test_opcheck_gradcheck_and_compile(device, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    k, v, grad = inputs((2, 3, 4, 2, 5), dtype, device)
    with lic_fast.use_backend(backend):
        for keys in (k, k.to(memory_format=torch.channels_last), torch.stack([k, k], -1)[..., 0]):
            leaves = [t.detach().requires_grad_() for t in (keys, v)]
            torch.library.opcheck(torch.ops.lic_fast.linear_attention_context, leaves)
            context, statistics = torch.ops.lic_fast.linear_attention_context(keys, v)
            backward = (grad, keys, v, (grad * context).sum(1), statistics)
            torch.library.opcheck(torch.ops.lic_fast.linear_attention_context_bwd, backward)
            if dtype is torch.float64:
                assert torch.autograd.gradcheck(linear_attention_context, leaves)
        whole = torch.compile(linear_attention_context, fullgraph=True, backend="aot_eager")
        expected = with_gradients(linear_attention_context, k, v, grad)
        for mine, e in zip(with_gradients(whole, k, v, grad), expected, strict=True):
            torch.testing.assert_close(mine, e)


@EVERY_BACKEND
def test_further_derivatives_are_refused(device, backend):
    k, v, _ = inputs((2, 3, 4, 5), device=device)
    k.requires_grad_()
    with lic_fast.use_backend(backend):
        (first,) = torch.autograd.grad(linear_attention_context(k, v).square().sum(), k, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_attention: gradients of gradients are not supported"):
            first.sum().backward()
        for function in (linear_attention_context, lambda *kv: linear_attention(k, *kv)):
            with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
                function(k, v)


def textbook(q, k, v, heads, scale):
    """Linear attention as an einsum over heads."""
    queries, keys, values = (t.reshape(len(t), heads, t.shape[1] // heads, -1) for t in (q, k, v))
    y = torch.einsum("bhkn,bhkm,bhvm->bhvn", queries * scale, keys.softmax(3), values)
    return y.reshape(len(v), v.shape[1], *q.shape[2:])


@EVERY_BACKEND
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_with_heads_by_the_rule(device, backend, heads):
    for last in (False, True):
        k, v, _ = inputs((2, 12, 18, 7, 9), device=device)
        q = inputs((2, 12, 18, 7, 9), device=device, seed=1)[0]
        if last:  # as the convolution that makes all three leaves them
            q, k, v = torch.cat([q, k, v], 1).to(memory_format=torch.channels_last).split((12, 12, 18), 1)
        for scale in (None, 0.7):
            value = (12 // heads) ** -0.5 if scale is None else scale
            run = lambda *t, s=scale: linear_attention(*t, heads=heads, scale=s)  # noqa: E731
            reference = lambda *t, s=value: textbook(*t, heads, s)  # noqa: E731
            found, grad = [], inputs((2, 18, 1, 7, 9), device=device, seed=2)[0]
            for function, dtype in ((run, k.dtype), (reference, k.dtype), (reference, torch.float64)):
                leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
                with lic_fast.use_backend(backend):
                    y = function(*leaves)
                    found.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))])
            for mine, theirs, truth in zip(*found, strict=True):
                assert_by_rule(mine, theirs, truth, 4.0)  # the einsum's order of products is another
    with lic_fast.use_backend(backend):
        whole = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(q, k, v), run(q, k, v))
        empty = linear_attention(q[..., :0], k[..., :0], v[..., :0], heads=heads)
    assert empty.shape == (2, 18, 7, 0)


K, V = torch.ones(2, 4, 5), torch.ones(2, 6, 5)
WRONG = [
    ({"k": torch.ones(3)}, ValueError, r"k must be \[B, K, \*\] with K >= 1, got \[3\]"),
    ({"k": torch.ones(2, 0, 5)}, ValueError, "K >= 1"),
    ({"v": torch.ones(2, 0, 5)}, ValueError, r"v must be \[B, V, \*\] with V >= 1 and k's places"),
    ({"v": torch.ones(2, 6, 4)}, ValueError, r"k's places, got \[2, 6, 4\] and \[2, 4, 5\]"),
    ({"v": torch.ones(3, 6, 5)}, ValueError, "k's places"),
    ({"v": torch.ones(2, 6, 5, 1)}, ValueError, "k's places"),
    ({"v": torch.ones(2, 6, 5).double()}, TypeError, "one dtype, got torch.float32 and torch.float64"),
    ({"k": torch.ones(2, 4, 5).long()}, TypeError, "k must be one of float32, bfloat16, float16, float64"),
    ({"v": torch.ones(2, 6, 5, device="meta")}, TypeError, "v must be on the device of k"),
    ({"v": [1.0]}, TypeError, "v must be a tensor, got list"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
@pytest.mark.parametrize("function", [linear_attention, linear_attention_context], ids=["attention", "context"])
def test_bad_input_is_named(function, change, error, message):
    given = {"k": K, "v": V} | change
    more = [given["k"]] if function is linear_attention else []
    with pytest.raises(error, match=message) as caught:
        function(*more, given["k"], given["v"])
    assert str(caught.value).startswith(f"{function.__name__}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 6, 5)}, ValueError, r"q must have the shape of k, got \[2, 6, 5\] and \[2, 4, 5\]"),
        ({"q": K.double()}, TypeError, "q, k and v must have one dtype"),
        ({"q": K.to("meta")}, TypeError, "q must be on the device of k"),
        ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
        ({"heads": 4}, ValueError, "heads must divide the channels 4 and 6, got 4"),
        ({"heads": 0}, ValueError, "heads must divide"),
        ({"heads": 2.0}, ValueError, "heads must divide"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
        ({"scale": "1"}, ValueError, "scale must be a finite number"),
    ],
)
def test_bad_queries_heads_and_scales_are_named(change, error, message):
    given = {"q": K, "heads": 2, "scale": None} | change
    with pytest.raises(error, match=message) as caught:
        linear_attention(given.pop("q"), K, V, **given)
    assert str(caught.value).startswith("linear_attention: ") and "\n" not in str(caught.value)


CHILD = """
import sys, torch
sys.path.insert(0, "tests")
from test_linear_attention import LARGE, SHAPES, assert_all_by_rule, inputs, linear_attention_context, with_gradients
import lic_fast
with lic_fast.use_backend("cpp"):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in SHAPES + LARGE:
            values = inputs(shape, dtype)
            assert_all_by_rule(with_gradients(linear_attention_context, *values), values)
            last = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in values[:2]] + values[2:]
            assert_all_by_rule(with_gradients(linear_attention_context, *last), last)
"""


@pytest.mark.parametrize("variant", ["generic", "avx2"])
def test_simd_variants(variant):
    if lic_fast.explain("linear_attention_context").reasons["cpp"]:
        pytest.skip("the native library is not built")
    environment = {**os.environ, "LIC_FAST_SIMD": variant}
    subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], check=True, env=environment, timeout=300)


def test_pieces_and_offsets_of_the_triton_kernels():
    pytest.importorskip("triton")
    from lic_fast.triton_kernels import linear_attention as kernels

    for B, k, v, n in ((1, 64, 64, 65536), (16, 64, 64, 65536), (1, 192, 192, 4096), (1, 384, 384, 64), (1, 1, 1, 1),
                       (2, 4000, 3000, 10**6), (1, 1, 1, 2**33), (64, 5, 2000, 333)):  # fmt: skip
        pieces, steps = kernels._pieces(B, k, v, n)
        each = steps * kernels.PLACES
        assert (pieces - 1) * each < n <= pieces * each  # none of them is empty
        assert pieces == 1 or B * pieces * (v + 2) * k * 4 <= kernels.PARTIAL_BYTES
        assert B * (pieces - 1) * -(-k // kernels.CHANNELS) * -(-v // kernels.CHANNELS) < kernels.PROGRAMS
    assert kernels._pieces(1, 64, 64, 65536)[0] >= 132 and kernels._pieces(1, 384, 384, 64)[0] == 1
    small, large = torch.empty(2, 300, 2**20, device="meta"), torch.empty(1, 1, 2**31, device="meta")
    assert kernels._index(small, small) is kernels.tl.int32
    for x in (large, small.repeat(1, 4, 1), small.repeat(1, 4, 1).mT, torch.empty(0, device="meta").expand(1, 1, 0)):
        assert kernels._index(small, x) is (kernels.tl.int64 if x.numel() else kernels.tl.int32)


def test_64_bit_offsets_in_the_triton_kernels(monkeypatch):
    from lic_fast import _triton

    if _triton.why_not("cpu") and _triton.why_not("cuda"):
        pytest.skip("Triton does not run here")
    from lic_fast.triton_kernels import linear_attention as kernels

    values = inputs((2, 65, 20, 400), device="cuda" if torch.cuda.is_available() else "cpu")
    with lic_fast.use_backend("triton"):
        expected = with_gradients(linear_attention_context, *values)
        monkeypatch.setattr(kernels, "_index", lambda *tensors: kernels.tl.int64)
        ours = with_gradients(linear_attention_context, *values)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

"""lic_fast.functional.affine_reconstruct and affine_reconstruct_ in every backend at hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import assert_by_rule, backend_parameters
from shapes import ODD, REAL, elic, strided, transposed

import lic_fast
from lic_fast.functional import affine_reconstruct, affine_reconstruct_
from lic_fast.ops.affine_reconstruct import MODES
from lic_fast.reference.affine_reconstruct import affine_reconstruct as reference

EVERY_BACKEND = backend_parameters("affine_reconstruct")
INTERPRETED = ("cpu", "triton")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16), (F64, F64)]
IDS = [f"{w}-{k}".replace("torch.", "") for w, k in DTYPES]


def skip_unsupported(device, backend, dtype):
    if (device, backend) == INTERPRETED and dtype is BF16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    reason = lic_fast.explain("affine_reconstruct", device, dtype).reasons[backend]
    if reason:
        pytest.skip(reason)


def embedding(shape, w_dtype=F32, k_dtype=F32, modes=10, mode_dtype=torch.uint8, device="cpu", seed=0):
    """w, k, d, mode, refs, tied for one tensor."""
    g = torch.Generator().manual_seed(seed)
    w, k, d = (torch.randn(shape, generator=g).to(dtype) for dtype in (w_dtype, k_dtype, k_dtype))
    mode = torch.randint(0, modes, shape, generator=g).to(mode_dtype)
    refs = torch.randn(modes, generator=g).to(k_dtype)
    tied = torch.rand(shape, generator=g) < 0.6
    return [t.to(device) for t in (w, k, d, mode, refs, tied)]


def formula(w, k, d, mode, refs, tied):
    """The specification written once more, for any dtype."""
    value = (k * refs[mode.long()] + d).to(w.dtype)
    return value if tied is None else torch.where(tied, value, w)


def gradients(function, tensors, tied, grad):
    w, k, d, mode, refs = (t.detach().clone() for t in tensors)
    inputs = [t.requires_grad_() for t in (w, k, d, refs)]
    return torch.autograd.grad(function(w, k, d, mode, refs, tied), inputs, grad, materialize_grads=True)


def run(w, k, d, mode, refs, tied):
    return affine_reconstruct(w, k, d, mode, refs, tied=tied)


@EVERY_BACKEND
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("w_dtype", "k_dtype"), DTYPES, ids=IDS)
def test_forward_and_backward_against_fp64(device, backend, w_dtype, k_dtype, masked):
    skip_unsupported(device, backend, w_dtype)
    for shape, modes in itertools.chain(
        ((s, 10) for s in ODD + REAL[1:3]), (((9, 111), m) for m in (1, 16, 17, 32, 33, 200))
    ):
        *tensors, tied = embedding(shape, w_dtype, k_dtype, modes, device=device)
        tied = tied if masked else None
        double = [t.double() if t.is_floating_point() else t for t in tensors]
        grad = torch.linspace(-1, 1, tensors[0].numel(), device=device).reshape(shape).to(w_dtype)
        with lic_fast.use_backend(backend):
            ours = run(*tensors, tied)
            ours_grads = gradients(run, tensors, tied, grad)
        assert_by_rule(ours, formula(*tensors, tied), formula(*double, tied))
        assert torch.equal(ours, reference(*tensors, tied))  # all backends round alike
        exact = gradients(formula, double, tied, grad.double())
        same = gradients(formula, tensors, tied, grad)
        for ours_grad, same_grad, exact_grad in zip(ours_grads, same, exact, strict=True):
            assert_by_rule(ours_grad, same_grad, exact_grad)


@EVERY_BACKEND
@pytest.mark.parametrize("mode_dtype", MODES)
def test_mode_dtypes(device, backend, mode_dtype):
    modes = 200 if (device, backend) == INTERPRETED or mode_dtype is torch.uint8 else 3000
    *tensors, tied = embedding((5, 1201), modes=modes, mode_dtype=mode_dtype, device=device)
    grad = torch.randn(5, 1201, device=device)
    with lic_fast.use_backend(backend):
        ours, grads = run(*tensors, tied), gradients(run, tensors, tied, grad)
    assert torch.equal(ours, reference(*tensors, tied))
    double = [t.double() if t.is_floating_point() else t for t in tensors]
    exact, same = gradients(formula, double, tied, grad.double()), gradients(formula, tensors, tied, grad)
    for ours_grad, same_grad, exact_grad in zip(grads, same, exact, strict=True):
        assert_by_rule(ours_grad, same_grad, exact_grad)


@EVERY_BACKEND
def test_in_place_on_elic_list(device, backend):
    shapes = elic((32, 40)) if (device, backend) == INTERPRETED else elic()
    columns = zip(*(embedding(s, device=device, seed=i) for i, s in enumerate(shapes)), strict=True)
    w, k, d, mode, refs, tied = map(list, columns)
    double = [formula(a.double(), b.double(), c.double(), m, refs[0].double(), t) for a, b, c, m, t in
              zip(w, k, d, mode, tied, strict=True)]  # fmt: skip
    same = [formula(*item[:4], refs[0], item[4]) for item in zip(w, k, d, mode, tied, strict=True)]
    with lic_fast.use_backend(backend):
        affine_reconstruct_(w, k, d, mode, refs[0], tied=tied)
    for ours, peer, exact in zip(w, same, double, strict=True):
        assert_by_rule(ours, peer, exact)


@EVERY_BACKEND
@pytest.mark.parametrize("masked", [True, False])
def test_in_place_on_mixed_lists(device, backend, masked):
    shapes = [(0,), (1,), (4, 6, 5, 3), (2049,), (3, 5)]
    items = [embedding(s, device=device, seed=i, mode_dtype=MODES[i % 3]) for i, s in enumerate(shapes)]
    refs = items[0][4]
    layouts = [
        torch.clone,
        torch.clone,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        strided,
        transposed,
    ]
    w = [layout(item[0]) for layout, item in zip(layouts, items, strict=True)]
    k = [strided(items[0][1]), *(item[1] for item in items[1:])]
    d, mode, tied = ([item[j] for item in items] for j in (2, 3, 5))
    expected = [reference(a, b, c, m, refs, t if masked else None) for a, b, c, m, t in
                zip(w, k, d, mode, tied, strict=True)]  # fmt: skip
    with lic_fast.use_backend(backend):
        affine_reconstruct_([], [], [], [], refs, tied=[])
        affine_reconstruct_(w, k, d, mode, refs, tied=tied if masked else None)
    assert all(torch.equal(a, b) for a, b in zip(w, expected, strict=True))


@EVERY_BACKEND
@pytest.mark.parametrize("layout", [strided, transposed, lambda t: t.contiguous(memory_format=torch.channels_last)])
def test_out_of_place_layouts(device, backend, layout):
    *tensors, tied = embedding((4, 6, 5, 3), device=device)
    expected = reference(*tensors, tied)
    grad = torch.randn(4, 6, 5, 3, device=device)
    expected_grads = gradients(formula, tensors, tied, grad)
    for position in range(4):
        moved = [layout(t) if i == position else t for i, t in enumerate(tensors)]
        with lic_fast.use_backend(backend):
            assert torch.equal(run(*moved, layout(tied)), expected)
            grads = gradients(run, moved, layout(tied), layout(grad))
        for ours, theirs in zip(grads[:3], expected_grads[:3], strict=True):
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(grads[3], expected_grads[3])


@EVERY_BACKEND
def test_opcheck_and_compile(device, backend):
    w, k, d, mode, refs, tied = embedding((6, 35), device=device)
    leaves = [t.clone().requires_grad_() for t in (w, k, d)]
    with lic_fast.use_backend(backend):
        for mask in (tied, None):
            torch.library.opcheck(torch.ops.lic_fast.affine_reconstruct, (w, k, d, mode, refs, mask))
            torch.library.opcheck(
                torch.ops.lic_fast.affine_reconstruct, (*leaves, mode, refs.clone().requires_grad_(), mask)
            )
        torch.library.opcheck(
            torch.ops.lic_fast.affine_reconstruct_bwd, (w, k, mode, refs, tied, [True, False, True, True])
        )
        torch.library.opcheck(torch.ops.lic_fast.affine_reconstruct_, ([w.clone()], [k], [d], [mode], refs, [tied]))
        compiled = torch.compile(lambda *a: run(*a, tied).square(), fullgraph=True, backend="aot_eager")
        out = compiled(leaves[0], leaves[1], leaves[2], mode, refs)
        out.sum().backward()
    assert torch.equal(out, reference(w, k, d, mode, refs, tied).square())
    value = reference(w, k, d, mode, refs, tied)
    torch.testing.assert_close(leaves[2].grad, torch.where(tied, 2 * value, 0.0))


@EVERY_BACKEND
def test_gradcheck_in_fp64(device, backend):
    w, k, d, mode, refs, tied = embedding((3, 7), F64, F64, device=device)
    leaves = [t.requires_grad_() for t in (w, k, d, refs)]
    with lic_fast.use_backend(backend):
        assert torch.autograd.gradcheck(lambda w, k, d, refs: run(w, k, d, mode, refs, tied), leaves)


@EVERY_BACKEND
def test_gradient_of_refs_is_the_same_in_every_run_and_for_any_number_of_threads(device, backend):
    n = 20_000 if (device, backend) == INTERPRETED else 400_000
    *tensors, tied = embedding((n,), device=device)
    grad = torch.randn(n, device=device)
    threads = torch.get_num_threads()
    results = []
    with lic_fast.use_backend(backend):
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(gradients(run, tensors, tied, grad)[3])
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@EVERY_BACKEND
def test_no_gradient_of_gradients(device, backend):
    w, k, d, mode, refs, _ = embedding((4,), device=device)
    with lic_fast.use_backend(backend):
        (grad,) = torch.autograd.grad(run(w, k.requires_grad_(), d, mode, refs, None).sum(), k, create_graph=True)
        if grad.requires_grad:
            with pytest.raises(RuntimeError, match="gradients of gradients"):
                grad.sum().backward()


@EVERY_BACKEND
def test_mode_outside_refs(device, backend):
    w, k, d, _, refs, _ = embedding((5000,), device=device)
    for bad in (-1, 10, 300):
        mode = torch.zeros(5000, dtype=torch.int32, device=device)
        mode[4321] = bad
        kept = w.clone()
        with lic_fast.use_backend(backend):
            if device == "cpu" and backend != "triton":
                with pytest.raises(ValueError, match=f"modes {min(bad, 0)} to {max(bad, 0)} with 10 refs"):
                    run(w, k, d, mode, refs, None)
                with pytest.raises(ValueError, match="every mode must be in"):
                    affine_reconstruct_(w, k, d, mode, refs)
                assert torch.equal(w, kept)
            else:
                assert run(w, k, d, mode, refs, None).isnan().nonzero().tolist() == [[4321]]


GOOD = embedding((4,))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.ones(4, dtype=torch.int32), TypeError, "w must be one of"),
        (0, [1.0], TypeError, "w must be a tensor"),
        (1, torch.ones(5), ValueError, r"k must have the shape of w, got \[5\] and \[4\]"),
        (1, torch.ones(4).double(), TypeError, "k must be one of float32, got torch.float64"),
        (2, torch.ones(4, device="meta"), TypeError, "d must be on the device of w"),
        (3, torch.zeros(4, dtype=torch.int64), TypeError, "mode must be one of uint8, int16, int32"),
        (3, torch.zeros(1, 4, dtype=torch.uint8), ValueError, "mode must have the shape of w"),
        (4, torch.ones(2, 5), ValueError, r"refs must have one dimension \[M\]"),
        (4, torch.ones(10).bfloat16(), TypeError, "refs must be one of float32"),
        (5, torch.ones(4), TypeError, "tied must be one of bool"),
        (5, torch.ones(3, dtype=torch.bool), ValueError, "tied must have the shape of w"),
    ],
)
def test_bad_input_is_named(position, value, error, message):
    arguments = list(GOOD)
    arguments[position] = value
    for function in (affine_reconstruct, affine_reconstruct_):
        if value == [1.0] and function is affine_reconstruct_:
            message = "w must be a tensor or a list of tensors"
        with pytest.raises(error, match=message) as caught:
            function(*arguments[:5], tied=arguments[5])
        assert "\n" not in str(caught.value)


def test_in_place_refuses_leaves_and_uneven_lists():
    w, k, d, mode, refs, _ = GOOD
    with pytest.raises(RuntimeError, match="under torch"):
        affine_reconstruct_(w.clone().requires_grad_(), k, d, mode, refs)
    with pytest.raises(ValueError, match="got 1 w and 2 k"):
        affine_reconstruct_([w], [k, k], [d], [mode], refs)
    with pytest.raises(ValueError, match="got 1 w and 0 tied"):
        affine_reconstruct_([w], [k], [d], [mode], refs, tied=[])


def test_nothing_is_written_where_any_tensor_of_a_mixed_list_is_bad():
    good, bad = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    modes = [torch.zeros(2, dtype=torch.uint8), torch.full((2,), 9, dtype=torch.uint8)]
    ones = [torch.ones(2), torch.ones(2)]
    with pytest.raises(ValueError, match="modes 9 to 9 with 1 refs"):
        affine_reconstruct_([good, bad], ones, ones, modes, torch.full((1,), 5.0))
    assert good.tolist() == [1, 1] and good._version == 0


def test_shared_memory_and_lost_derivatives_are_refused():
    w, k, d, mode, refs, _ = embedding((33,))
    whole = torch.ones(40)
    with pytest.raises(ValueError, match=r"w\[0\] and k\[0\] share memory"):
        affine_reconstruct_(whole[:33], whole[3:36], d, mode, refs)
    with pytest.raises(RuntimeError, match="refs requires grad"):
        affine_reconstruct_(w, k, d, mode, refs.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda refs: affine_reconstruct(w, k, d, mode, refs), (refs,), (refs,))


@EVERY_BACKEND
def test_many_modes(device, backend):
    if (device, backend) == INTERPRETED:
        pytest.skip("too slow under the interpreter")
    *tensors, tied = embedding((4099,), modes=50_000, mode_dtype=torch.int32, device=device)
    grad = torch.randn(4099, device=device)
    with lic_fast.use_backend(backend):
        ours = gradients(run, tensors, tied, grad)[3]
    torch.testing.assert_close(ours, gradients(formula, tensors, tied, grad)[3])

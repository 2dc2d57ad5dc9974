"""lic_fast.entropy against the classes of CompressAI that it stands for: likelihoods, gradients, noise, settings."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from compressai import entropy_models as stock
from conftest import assert_by_rule
from torch import nn

from lic_fast import entropy

K = 3


def pair(ours: nn.Module, **attributes):
    """(ours, CompressAI's with the same parameters, the same in fp64), in one mode."""
    theirs = copy.deepcopy(ours)
    theirs.__class__ = type(ours)._lic_fast_stock
    for name, value in attributes.items():
        setattr(ours, name, value)
    return ours, theirs, copy.deepcopy(theirs).double()


def bottleneck(channels=5, filters=(3, 3, 3, 3)):
    torch.manual_seed(1)
    made = entropy.EntropyBottleneck(channels, filters=filters)
    with torch.no_grad():
        for values in (*made.matrices, *made.biases, *made.factors):
            values.add_(0.3 * torch.randn_like(values))
        made.quantiles[:, :, 1] += 0.3 * torch.randn(channels, 1)
    return made


def gaussian_inputs(shape, scales=None, means=None, dtype=torch.float32):
    """y, scales and means: scales from below the bound to 4, the density within 6 sigma or far below the bound."""
    generator = torch.Generator().manual_seed(0)
    y = 3 * torch.randn(shape, generator=generator)
    s = 0.05 + 4 * torch.rand(scales or shape, generator=generator)
    m = torch.randn(means or shape, generator=generator) if means != () else None
    return [None if t is None else t.to(dtype) for t in (y, s, m)]


def run(module, inputs, training=None, seed=0, dtype=None):
    """(y_hat, likelihood, gradients of inputs and parameters) with a loss that weighs every element differently."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    torch.manual_seed(seed)
    y_hat, likelihood = module(*leaves, training=training)
    weigh = torch.linspace(0.5, 1.5, max(likelihood.numel(), 1), dtype=likelihood.dtype)[: likelihood.numel()]
    loss = -(likelihood.log() * weigh.reshape(likelihood.shape)).sum() + (y_hat.double() ** 2).sum()
    wanted = [leaf for leaf in leaves if leaf is not None] + [p for p in module.parameters()]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return y_hat.detach(), likelihood.detach(), gradients


FACTOR = (
    8.0  # of the rule: near the centre ours are good to 3e-7, differences of erfc, where few are asked for, to 4e-8
)


def compare(modules, inputs, training=None):
    """Equality by the tolerance rule; y_hat to the bit."""
    ours, theirs, exact = modules
    (y_a, p_a, g_a), (y_b, p_b, g_b) = (run(module, inputs, training) for module in (ours, theirs))
    if training:  # the noise of fp64 is another: the fp64 truth is taken at the same y_hat
        exact = copy.deepcopy(exact)
        noise = (y_b - inputs[0]).double()
        if isinstance(exact, stock.EntropyBottleneck):
            noise = noise.transpose(0, 1)
        exact.quantize = lambda values, mode, means=None: values + noise.reshape(values.shape)
    _, p, g = run(exact, inputs, training, dtype=torch.float64)
    assert torch.equal(y_a, y_b) and y_a.is_contiguous()
    assert p_a.dtype is torch.float32 and p_a.shape == p_b.shape
    assert_by_rule(p_a, p_b, p, FACTOR)
    for a, b, c in zip(g_a, g_b, g, strict=True):
        assert (a is None or not a.any()) == (c is None or not c.any())
        if c is not None and a is not None:
            assert_by_rule(a, torch.zeros_like(c) if b is None else b, c, FACTOR)


SHAPES = [(2, 5, 4, 3), (1, 5), (2, 5, 7), (1, 3, 2, 3, 2), (0, 5, 2, 2), (1, 1, 1, 1)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (6,)])
def test_gaussian_is_compressais(shape, training):
    modules = pair(entropy.GaussianConditional(None), noise="torch")
    compare(modules, gaussian_inputs(shape), training)
    compare(modules, gaussian_inputs(shape, means=())[:2], training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("scales", "means"), [((1, 5, 1, 1), (5, 1, 1)), ((4, 3), (2, 1, 4, 3)), ((1,), (1,))])
def test_gaussian_broadcasts_as_compressais(scales, means, training):
    modules = pair(entropy.GaussianConditional(None), noise="torch")
    compare(modules, gaussian_inputs((2, 5, 4, 3), scales, means), training)


def test_gaussian_broadcasts_the_inputs_too():
    ours, theirs, _ = pair(entropy.GaussianConditional(None))
    y, s, m = gaussian_inputs((1, 5, 4, 3), (2, 5, 4, 3), (5, 1, 1))
    for a, b in zip(ours(y, s, m, training=False), theirs(y, s, m, training=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert ours(y, s, m, training=True)[1].shape == (2, 5, 4, 3)


def test_strided_and_channels_last_inputs():
    modules = pair(entropy.GaussianConditional(None), noise="torch")
    y, s, m = gaussian_inputs((2, 6, 4, 3))
    halves = torch.cat([s, m], 1).chunk(2, 1)
    last = y.contiguous(memory_format=torch.channels_last)
    for training in (False, True):
        torch.manual_seed(3)
        a = modules[0](last, *halves, training=training)
        torch.manual_seed(3)
        b = modules[1](last, *halves, training=training)
        assert torch.equal(a[0], b[0])
        torch.testing.assert_close(a[1], b[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("shape", "k"), [((2, 5, 4, 3), 3), ((1, 2, 3), 1), ((0, 5, 2, 2), 2), ((1, 1, 1, 1), 16)])
def test_mixture_is_compressais(shape, k, training):
    modules = pair(entropy.GaussianMixtureConditional(k), noise="torch")
    many = (shape[0], k * shape[1], *shape[2:])
    y, s, m = gaussian_inputs(shape, many, many)
    weights = torch.rand(shape[0], k, *shape[1:]).softmax(1).reshape(many)
    compare(modules, [y, 0.5 + s, m, weights], training)


def test_mixture_broadcasts_and_takes_more_components_than_the_op():
    y, s, m = gaussian_inputs((2, 4, 3, 3), (1, 12, 1, 1), (2, 12, 3, 3))
    weights = torch.full((1, 12, 1, 1), 1 / 3)
    ours, theirs, _ = pair(entropy.GaussianMixtureConditional(3).eval())
    torch.testing.assert_close(ours(y, s, m, weights), theirs(y, s, m, weights), rtol=1e-4, atol=1e-6)
    s, m, weights = (torch.rand(2, 4 * 17, 3, 3) for _ in range(3))
    ours, theirs, _ = pair(entropy.GaussianMixtureConditional(17).eval())
    torch.testing.assert_close(ours(y, s, m, weights / 17), theirs(y, s, m, weights / 17), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bottleneck_is_compressais(shape, training):
    compare(pair(bottleneck(shape[1]), noise="torch"), gaussian_inputs(shape)[:1], training)


def test_bottleneck_with_other_filters_and_layouts():
    ours, theirs, exact = pair(bottleneck(4, (2, 3)), noise="torch")
    compare((ours, theirs, exact), gaussian_inputs((2, 4, 3, 3))[:1], False)
    last = gaussian_inputs((2, 4, 3, 3))[0].contiguous(memory_format=torch.channels_last)
    for training in (False, True):
        torch.manual_seed(3)
        a = ours(last, training=training)
        torch.manual_seed(3)
        b = theirs(last, training=training)
        assert torch.equal(a[0], b[0]) and a[0].is_contiguous()


MODULES = {
    "gaussian": (lambda: entropy.GaussianConditional(None), lambda d: gaussian_inputs((2, 4, 3, 3), dtype=d)),
    "mixture": (
        lambda: entropy.GaussianMixtureConditional(K),
        lambda d: [*gaussian_inputs((2, 4, 3, 3), *2 * [(2, 12, 3, 3)], d), torch.full((2, 12, 3, 3), 0.25, dtype=d)],
    ),
    "bottleneck": (lambda: bottleneck(4), lambda d: gaussian_inputs((2, 4, 3, 3), dtype=d)[:1]),
}
every_module = pytest.mark.parametrize(("make", "inputs"), MODULES.values(), ids=list(MODULES))


@every_module
def test_the_modules_mode_decides_and_the_argument_overrides(make, inputs):
    module, given = make(), inputs(torch.float32)
    rounded, _ = module(*given, training=False)
    assert torch.equal(module.eval()(*given)[0], rounded)
    noisy, _ = module(*given, training=True)
    torch.manual_seed(0)
    first = module.train()(*given)[0]
    second = module(*given)[0]
    torch.manual_seed(0)
    assert torch.equal(module(*given)[0], first) and not torch.equal(first, second)
    for values in (noisy, first):
        assert 0.3 < (values - given[0]).abs().max() <= 0.5 and not torch.equal(values, rounded)


@every_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_modules_in_other_dtypes(make, inputs, dtype):
    """y_hat in the model's dtype; likelihoods in fp32, where 1e-9 does not underflow as it does in fp16."""
    module, given = make().to(dtype).eval(), inputs(dtype)
    far = [1e3 * torch.ones_like(given[0]), *given[1:]]
    for training in (False, True):
        y_hat, likelihood = module(*given, training=training)
        assert y_hat.dtype is dtype and likelihood.dtype is torch.promote_types(dtype, torch.float32)
        assert bool((likelihood >= 0.99e-9).all()) and module(*far, training=training)[1].min() <= 1.01e-9
        module.noise = "torch"
        assert module(*given, training=training)[0].dtype is dtype
    exact = make().double().eval()
    exact.load_state_dict(module.state_dict())
    # Rounding in two dtypes may differ by one: compare at the same y_hat
    module.noise = exact.noise = "counter"
    with torch.no_grad():
        p = module(*given)[1]
        q = exact(*(t.double() for t in given))[1]
    agree = (p.double() - q).abs() <= 1e-3 + (1e-2 if dtype is torch.bfloat16 else 1e-3) * q
    assert agree.double().mean() > 0.9


def test_mixed_dtypes_promote():
    y, s, m = gaussian_inputs((2, 4, 3, 3))
    module = entropy.GaussianConditional(None).eval()
    y_hat, likelihood = module(y.bfloat16(), s, m.double())
    assert y_hat.dtype is torch.bfloat16 and likelihood.dtype is torch.float64
    y_hat, likelihood = module(y.half(), s.bfloat16())
    assert y_hat.dtype is torch.float16 and likelihood.dtype is torch.float32
    y_hat, likelihood = bottleneck(4).eval()(y.bfloat16())
    assert y_hat.dtype is torch.bfloat16 and likelihood.dtype is torch.float32
    y_hat, likelihood = bottleneck(4).double().eval()(y)
    assert y_hat.dtype is torch.float32 and likelihood.dtype is torch.float64


@every_module
def test_gradients_far_away_vanish_with_compressais_bound_only(make, inputs):
    for bound, alive in (("compressai", False), ("none", True)):
        module = make()
        module.bound = bound
        given = inputs(torch.float32)
        given[0] = torch.full_like(given[0], 300.0).requires_grad_()
        _, likelihood = module(*given, training=True)
        (gradient,) = torch.autograd.grad(likelihood.log().sum(), given[0])
        assert bool((gradient.abs() > 1e-3).all()) == alive and bool(torch.isfinite(gradient).all())


def test_the_modules_own_bounds_are_used():
    y, s, _ = gaussian_inputs((1, 2, 8, 8))
    module = entropy.GaussianConditional(None, scale_bound=1.5, likelihood_bound=0.01).eval()
    exact = stock.GaussianConditional(None, scale_bound=1.5, likelihood_bound=0.01).eval()
    torch.testing.assert_close(module(y, s), exact(y, s), rtol=1e-4, atol=1e-6)
    for theirs, value in ((module.likelihood_lower_bound, 0.1), (module.lower_bound_scale, 3.0)):
        theirs.bound.fill_(value)  # as loading a state dict does
    exact.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(y, s), exact(y, s), rtol=1e-4, atol=1e-6)
    free = entropy.GaussianConditional(None, likelihood_bound=0).eval()
    assert 0 < free(100 + y, s)[1].min() < 1e-30


@every_module
@pytest.mark.parametrize("name", ["bound", "noise"])
def test_unknown_settings_raise(make, inputs, name):
    module = make()
    setattr(module, name, "nonsense")
    with pytest.raises(ValueError, match=f"{name} must be one of .* got 'nonsense'"):
        module(*inputs(torch.float32))


@every_module
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(make, inputs, training):
    module, given = make(), inputs(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    a = run(compiled, given, training)
    b = run(module, given, training)
    for x, y in zip([*a[:2], *a[2]], [*b[:2], *b[2]], strict=True):
        assert (x is None and y is None) or torch.allclose(x, y, rtol=1e-5, atol=1e-6)


BOUND = torch.tensor(0.11).item()
CURIOUS = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, BOUND, 0.25, 0.5, 1e-30, 4.0, 1e30]


@pytest.mark.parametrize("table", [[0.11, 0.25, 0.5, 4.0], [0.3], [0.11, 0.11, 0.5]])
@pytest.mark.parametrize("module_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_build_indexes_is_compressais_to_the_bit(table, module_dtype, dtype):
    ours, theirs, _ = pair(entropy.GaussianConditional(table).to(module_dtype))
    scales = torch.cat([torch.tensor(CURIOUS), torch.logspace(-2, 1, 85)]).to(dtype).reshape(2, 4, 3, 4)
    for given in (scales, scales[:, :, 1:, ::2], scales.permute(0, 2, 3, 1), scales[:0], scales[0, 0, 0, 0]):
        a, b = ours.build_indexes(given), theirs.build_indexes(given)
        assert torch.equal(a, b) and a.dtype is b.dtype is torch.int32


def test_build_indexes_with_a_table_in_disorder():
    ours, theirs, _ = pair(entropy.GaussianConditional([1.0, 2.0, 3.0, 4.0]))
    ours.scale_table = theirs.scale_table = torch.tensor([3.0, 1.0, 2.0, 0.5])
    scales = torch.linspace(0, 5, 50)
    assert torch.equal(ours.build_indexes(scales), theirs.build_indexes(scales))


def test_what_compressais_code_calls_is_there():
    ours, theirs, _ = pair(bottleneck())
    x = gaussian_inputs((2, 5, 4, 4))[0]
    for mode in ("symbols", "dequantize"):
        assert torch.equal(ours.quantize(x, mode), theirs.quantize(x, mode))
    assert torch.equal(ours.loss(), theirs.loss()) and torch.equal(ours._get_medians(), theirs._get_medians())
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert isinstance(ours, stock.EntropyBottleneck)
    with pytest.raises(ValueError, match="Invalid quantization mode"):
        ours.quantize(x, "other")


def test_a_missing_compressai_is_named():
    code = (
        "import sys; sys.modules['compressai'] = None; import lic_fast, lic_fast.entropy, torch\n"
        "for call in (lambda: lic_fast.entropy.EntropyBottleneck, lambda: lic_fast.accelerate(torch.nn.ReLU())):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install lic_fast[compressai]") == 2

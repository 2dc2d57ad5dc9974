"""Tables and streams of lic_fast.entropy: CompressAI's to the bit, never stale, and quantiles without an optimizer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from compressai import entropy_models as stock
from compressai.models.base import get_scale_table
from compressai.models.utils import remap_old_keys
from torch import nn

from lic_fast import entropy
from lic_fast.entropy import _coder, gaussian_mixture

TABLES = ("_quantized_cdf", "_cdf_length", "_offset")


@pytest.fixture(params=["best", "compressai"], autouse=True)
def coder(request, monkeypatch):
    """The coder that would be used here, and CompressAI's."""
    if request.param == "compressai":
        monkeypatch.setattr(_coder, "prefers_stock", lambda op, dtype: True)
    return request.param


def bottleneck(channels=4, spread=0.3):
    torch.manual_seed(1)
    made = entropy.EntropyBottleneck(channels)
    with torch.no_grad():
        for values in (*made.matrices, *made.biases, *made.factors):
            values.add_(spread * torch.randn_like(values))
    made.solve_quantiles()
    return made.eval()


def as_stock(ours):
    theirs = copy.deepcopy(ours)
    theirs.__class__ = type(ours)._lic_fast_stock
    return theirs


def tables(module):
    return [getattr(module, name) for name in TABLES]


def same_tables(a, b):
    return all(torch.equal(x, y) and x.dtype is y.dtype for x, y in zip(tables(a), tables(b), strict=True))


def test_tables_are_compressais():
    ours = bottleneck()
    theirs = as_stock(ours)
    assert ours.update() and theirs.update() and same_tables(ours, theirs)
    assert not ours.update() and ours.update(force=True) and same_tables(ours, theirs)
    assert ours.update(force=True, update_quantiles=True) and theirs.update(force=True, update_quantiles=True)
    assert torch.equal(ours.quantiles, theirs.quantiles) and same_tables(ours, theirs)
    ours, theirs = entropy.GaussianConditional([0.5, 1.0, 9.0]), stock.GaussianConditional([0.5, 1.0, 9.0])
    ours.update(), theirs.update()
    assert same_tables(ours, theirs)
    for module in (ours, theirs):
        assert not module.update_scale_table([1.0, 2.0]) and module.update_scale_table([1.0, 2.0], force=True)
    assert same_tables(ours, theirs) and torch.equal(ours.scale_table, theirs.scale_table)


def test_tables_make_themselves():
    x = 3 * torch.randn(2, 4, 3, 3)
    ours = bottleneck()
    theirs = as_stock(ours)
    theirs.update()
    assert ours.compress(x) == theirs.compress(x) and same_tables(ours, theirs)
    assert torch.equal(bottleneck().quantized_cdf, theirs.quantized_cdf)
    assert torch.equal(bottleneck().cdf_length, theirs.cdf_length)
    assert torch.equal(bottleneck().offset, theirs.offset)
    assert torch.equal(
        bottleneck().decompress(theirs.compress(x), (3, 3)), theirs.decompress(theirs.compress(x), (3, 3))
    )
    ours, theirs = entropy.GaussianConditional(None), stock.GaussianConditional(None)
    theirs.update_scale_table(get_scale_table())
    scales = torch.rand_like(x)
    assert torch.equal(ours.build_indexes(scales), theirs.build_indexes(scales)) and same_tables(ours, theirs)
    assert same_tables(entropy.GaussianConditional(None), ours) is False
    assert torch.equal(entropy.GaussianConditional(None).quantized_cdf, theirs.quantized_cdf)


CHANGES = {
    "in place": lambda m: m.biases[2].data.add_(0.5),
    "copy_": lambda m: m.quantiles.data.copy_(2 * m.quantiles.data),
    "data": lambda m: setattr(m.matrices[0], "data", m.matrices[0] + 1),
    "new parameter": lambda m: m.factors.__setitem__(1, nn.Parameter(m.factors[1] + 1)),
    "solve_quantiles": lambda m: (m.biases[4].data.add_(9.0), m.solve_quantiles()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_stale_tables_are_made_anew(change):
    ours, x = bottleneck(), 3 * torch.randn(2, 4, 3, 3)
    before = ours.compress(x)
    change(ours)
    fresh = as_stock(ours)
    fresh.update(force=True)
    copied, pickled = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    assert ours.compress(x) == fresh.compress(x) != before
    assert copied.compress(x) == pickled.compress(x) == fresh.compress(x)
    assert same_tables(ours, fresh) and ours.update() is False


def test_a_step_of_an_optimizer_makes_tables_stale_and_update_sees_it():
    ours = bottleneck().train()
    ours.update()
    optimizer = torch.optim.Adam(ours.parameters(), 0.1)
    for rate in (0.0, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        ours(torch.randn(1, 4, 8, 8))[1].log().sum().neg().backward()
        optimizer.step()
        assert ours.update() is (rate > 0)
    conditional = entropy.GaussianConditional([1.0, 2.0])
    conditional.update()
    conditional.scale_table = torch.tensor([1.0, 3.0])
    assert conditional.update_scale_table([7.0, 8.0]) is True and conditional.scale_table.tolist() == [1.0, 3.0]
    other = stock.GaussianConditional([1.0, 3.0])
    other.update()
    assert same_tables(conditional, other)


def test_loaded_tables_are_kept_until_a_parameter_changes():
    source = as_stock(bottleneck())
    source.update()
    source._quantized_cdf[torch.arange(4), 1 - source._offset.long()] += (
        1  # tables that no update() here would make: those of another machine
    )
    for holder in (nn.Sequential, nn.Module):
        ours = nn.Sequential(entropy.EntropyBottleneck(4)) if holder is nn.Sequential else entropy.EntropyBottleneck(4)
        module = ours[0] if holder is nn.Sequential else ours
        state = (nn.Sequential(source) if holder is nn.Sequential else source).state_dict()
        module.update()
        ours.load_state_dict(state)
        moved = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
        for kept in (ours, moved.double().half().float(), moved.to("cpu")):
            kept = kept[0] if holder is nn.Sequential else kept
            x = torch.randn(1, 4, 2, 2)
            assert same_tables(kept, source) and kept.update() is False
            assert torch.equal(kept.quantized_cdf, source.quantized_cdf)
            assert kept.compress(x) and same_tables(kept, source)
        module.load_state_dict(state if holder is nn.Module else source.state_dict())
        module.matrices[0].data.mul_(1.5)
        assert not torch.equal(module.quantized_cdf, source.quantized_cdf)


def test_tables_of_compressais_class_and_assigned_ones_are_kept():
    theirs = as_stock(bottleneck())
    theirs.update()
    theirs._quantized_cdf[torch.arange(4), 1 - theirs._offset.long()] += 1  # near the median, where none gets to 0
    x = torch.randn(1, 4, 2, 2)
    expected = theirs.compress(x)
    ours = copy.deepcopy(theirs)
    ours.__class__ = entropy.EntropyBottleneck
    assert ours.compress(x) == expected
    ours._quantized_cdf = ours._quantized_cdf.clone()
    for module in (ours, theirs):  # the median is a bit likelier; the coder's own copy follows
        module._quantized_cdf[torch.arange(4), 1 - module._offset.long()] += 9
    assert ours.compress(x) == theirs.compress(x) != expected


def test_a_state_dict_of_other_sizes_and_names_loads_both_ways():
    source = bottleneck()
    source.update()
    empty, full = entropy.EntropyBottleneck(4), bottleneck(spread=1.0)
    full.update()
    assert full._quantized_cdf.shape != source._quantized_cdf.shape
    nn.ModuleList([full]).load_state_dict(nn.ModuleList([source]).state_dict())
    assert same_tables(full, source)
    nn.ModuleList([full]).load_state_dict(nn.ModuleList([empty]).state_dict())
    assert full._quantized_cdf.numel() == 0 and torch.equal(full.biases[0], empty.biases[0])
    for pattern in ("_{}{}", "_{}s.{}"):
        state = {}
        for key, value in source.state_dict().items():
            name, _, i = key.partition(".")
            single = {"matrices": "matrix", "biases": "bias", "factors": "factor"}.get(name)
            old = f"_{single}{i}" if pattern == "_{}{}" else f"_{name}.{i}"
            state[f"inner.{old if single else key}"] = value
        model = nn.Module()
        model.inner = entropy.EntropyBottleneck(4)
        model.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(model.inner.parameters(), source.parameters(), strict=True))
        assert same_tables(model.inner, source) and not model.inner.update()
    assert "inner.matrices.0" in remap_old_keys("inner", {"inner._matrix0": 0})
    theirs = stock.EntropyBottleneck(4)
    for name, value in zip(TABLES, tables(source), strict=True):
        setattr(theirs, name, torch.zeros_like(value))
    theirs.load_state_dict(source.state_dict())
    assert same_tables(theirs, source)
    conditional = entropy.GaussianConditional([1.0, 2.0, 3.0])
    conditional.update()
    other = entropy.GaussianConditional(None)
    other.load_state_dict(conditional.state_dict())
    assert same_tables(other, conditional) and torch.equal(other.scale_table, conditional.scale_table)


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 4), (3, 4, 2), (1, 4, 1, 2, 2), (0, 4, 2, 2), (2, 4, 0, 2)])
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_streams_are_compressais(shape, size):
    """Values of 1000 lie outside of the tables: they are escapes."""
    ours, x = bottleneck(), size * torch.randn(shape)
    theirs = as_stock(ours)
    theirs.update()
    streams = ours.compress(x)
    if x.numel() or not len(x):
        assert streams == theirs.compress(x)
        assert torch.equal(ours.decompress(streams, shape[2:]), theirs.decompress(streams, shape[2:]))
    assert ours.decompress(streams, shape[2:]).shape == x.shape
    conditional = entropy.GaussianConditional(None)
    reference = stock.GaussianConditional(None)
    reference.update_scale_table(get_scale_table())
    indexes = conditional.build_indexes(5 * torch.rand(shape))
    for means in (None, torch.randn(shape)):
        streams = conditional.compress(x, indexes, means)
        if x.numel() or not len(x):
            assert streams == reference.compress(x, indexes, means)
        a = conditional.decompress(streams, indexes, means=means)
        assert torch.equal(a, conditional.quantize(x, "dequantize", means))


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 40.0, -40.0])
def test_zero_and_one_symbol(value):
    """CompressAI crashes here; its bytes are what its encoder makes of the symbol followed by nothing."""
    conditional = entropy.GaussianConditional(None)
    for shape in ((1, 1), (1, 1, 1, 1)):
        x, indexes = torch.full(shape, value), torch.full(shape, 9, dtype=torch.int32)
        (stream,) = conditional.compress(x, indexes)
        assert torch.equal(conditional.decompress([stream], indexes), x)
        assert stock.GaussianConditional.decompress(conditional, [stream], indexes) == value
    assert conditional.compress(torch.empty(1, 0), torch.empty(1, 0)) == [bytes.fromhex("0000008000000000")]


def test_wrong_arguments():
    ours = entropy.GaussianConditional(None)
    theirs = stock.GaussianConditional(None)
    theirs.update_scale_table(get_scale_table())
    x, i = torch.rand(2, 3, 4), torch.zeros(2, 3, 4)
    wrong = [
        lambda m: m.compress(torch.rand(3), torch.rand(3)),
        lambda m: m.compress(x, i[:1]),
        lambda m: m.compress(x, i, torch.rand(7)),
        lambda m: m.decompress("text", i),
        lambda m: m.decompress([b""], i),
        lambda m: m.decompress([b""], torch.rand(1)),
        lambda m: m.decompress([b"", b""], i, means=torch.rand(1, 3, 4)),
        lambda m: m.decompress([b"", b""], i, means=torch.rand(2, 3, 2)),
    ]
    for call in wrong:
        with pytest.raises((ValueError, RuntimeError)) as expected:
            call(theirs)
        with pytest.raises(expected.type) as error:
            call(ours)
        assert str(error.value) == str(expected.value)
    for index in (-1, 64):
        with pytest.raises(ValueError, match=r"indexes must be in \[0, 64\)"):
            ours.compress(x, torch.full_like(x, index))
    with pytest.raises(TypeError, match="stream must be bytes"):
        ours.decompress(["text", "text"], i)


def test_truncated_streams_raise(coder):
    ours, x = bottleneck(), 20 * torch.randn(1, 4, 8, 8)
    (stream,) = ours.compress(x)
    cuts = (0, 4, 7) if _coder._stock() else (0, 4, 7, 8, len(stream) // 2, len(stream) - 4)
    for cut in cuts:
        with pytest.raises(ValueError):
            ours.decompress([stream[:cut]], (8, 8))


def mixture_inputs(shape=(1, 5, 4, 3), k=3):
    torch.manual_seed(0)
    b, c, *rest = shape
    y = 4 * torch.randn(shape)
    y[:, 1] = 0
    s, m = (torch.rand(b, k * c, *rest) * 3 for _ in range(2))
    return y, s + 0.05, m - 1, torch.rand(b, k, c, *rest).softmax(1).reshape(b, k * c, *rest)


@pytest.mark.parametrize("elements", [1, 100, 1 << 22])
def test_mixture_streams_are_compressais(elements, monkeypatch):
    """Also where the tables are made in many parts; and the arguments stay as they are."""
    monkeypatch.setattr(gaussian_mixture, "_CDF_ELEMENTS", elements)
    ours, theirs = entropy.GaussianMixtureConditional(3), stock.GaussianMixtureConditional(3)
    given = mixture_inputs()
    before = [t.clone() for t in given]
    ((a, a_max, a_map), a_hat), ((b, b_max, b_map), b_hat) = ours.compress(*given), theirs.compress(*given)
    assert a == b and a_max == b_max and torch.equal(a_map, b_map) and torch.equal(a_hat, b_hat)
    decoded = ours.decompress(a, a_max, a_map, *given[1:])
    assert torch.equal(decoded, a_hat) and torch.equal(theirs.decompress(a, a_max, a_map, *given[1:]), a_hat)
    scales, means, weights = (t.reshape(3, -1) for t in given[1:])
    assert torch.equal(
        ours._build_cdf(scales, means, weights, 9), theirs._build_cdf(*map(torch.clone, (scales, means, weights)), 9)
    )
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_mixture_edges():
    ours = entropy.GaussianMixtureConditional(3)
    for y in (torch.zeros(1, 5, 2, 2), torch.tensor([0, -5.6, 5.6, 0, 0]).reshape(1, 5, 1, 1)):
        given = [y, *mixture_inputs((1, 5, *y.shape[2:]))[1:]]
        (stream, abs_max, bitmap), y_hat = ours.compress(*given)
        assert torch.equal(ours.decompress(stream, abs_max, bitmap, *given[1:]), y_hat)
    with pytest.raises(ValueError, match="one at a time"):
        ours.compress(*mixture_inputs((2, 5, 2, 2)))
    given = mixture_inputs()
    (stream, abs_max, bitmap), _ = ours.compress(*given)
    for cut in (b"", stream[:7], stream[:8], stream[: len(stream) // 8 * 4], stream[:-4], stream[:20] + stream[16:]):
        with pytest.raises(ValueError, match="truncated"):
            ours.decompress(cut, abs_max, bitmap, *given[1:])
    with pytest.raises(ValueError, match="other scales"):
        ours.decompress(stream, abs_max, bitmap, given[1] * 2, *given[2:])


def test_solve_quantiles():
    ours = bottleneck(8)
    assert ours.loss() < 1e-3 * ours.target.abs().sum()
    theirs = as_stock(ours)
    theirs._update_quantiles()
    torch.testing.assert_close(ours.quantiles, theirs.quantiles, rtol=1e-3, atol=2e-3)
    exact = as_stock(ours).double()
    for step in (-1, 1):  # the neighbours in fp32 lie on the other side of the target, or further from it
        beside = torch.nextafter(ours.quantiles, torch.full_like(ours.quantiles, step * torch.inf)).double()
        at, near = (exact._logits_cumulative(q, True) - exact.target for q in (exact.quantiles, beside))
        assert bool((at.abs() <= near.abs() + 1e-9).all())
    parameter, version = ours.quantiles, ours.quantiles._version
    model = nn.ModuleList([ours, as_stock(ours), stock.EntropyBottleneckVbr(2), nn.ReLU()])
    assert entropy.solve_quantiles(model) == 3
    assert ours.quantiles is parameter and parameter._version > version and parameter.requires_grad
    assert torch.equal(model[0].quantiles, model[1].quantiles)
    assert model[2].loss() < 1e-3


def test_solve_quantiles_of_densities_that_are_no_good():
    ours = bottleneck()
    ours.matrices[0].data[1] = -100.0
    with pytest.warns(RuntimeWarning, match="1 of 4 channels have quantiles beyond 100000"):
        ours.solve_quantiles()
    assert ours.quantiles[1].abs().max() == 1e5 and ours.quantiles[[0, 2, 3]].abs().max() < 1e3
    ours.biases[0].data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        entropy.solve_quantiles(ours)

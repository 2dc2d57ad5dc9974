"""The tables of lic_fast's bitstream: the constants that ship, those of trained models, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lic_fast import coding
from lic_fast.coding import (
    Tables,
    _allocate,
    _generate,
    constant_tables,
    decode,
    encode,
    factorized_tables,
    join_tables,
)
from lic_fast.coding._serialize import deserialize, serialize

SHA256 = {
    "gaussian": "e97b93194c65c1690645ecf3276679d7512cf8e7c169291d825dac197a26224e",
    "laplace": "68eee9d072e53a4576b2d7e1fc34b0fb8fd203dcc572531b324abd6fa910a9d9",
    "logistic": "a2304988760087e685347027ac9531fe5ee1c489b70566c6e4cfed65a67b80c4",
}
FOLDER = Path(coding.__file__).parent / "constant_tables"


@pytest.mark.parametrize("family", coding.FAMILIES)
def test_constants_never_change(family):
    assert hashlib.sha256((FOLDER / f"{family}.bin").read_bytes()).hexdigest() == SHA256[family]
    assert constant_tables(family).hash == SHA256[family][:16]
    assert len(constant_tables(family)) == 244 and constant_tables(family).ladder == 0


@pytest.mark.parametrize("family", coding.FAMILIES)
def test_constants_come_out_again(family):
    pytest.importorskip("mpmath")
    precision, ladder, rows, levels = deserialize(constant_tables(family).serialized)
    assert (precision, ladder, levels) == (14, 0, _generate.make_levels(family))
    for level in (0, 1, 23, 50, len(rows) - 1):
        offset, frequencies = _generate.make_row(family, level)
        assert (offset, tuple(frequencies)) == rows[level]
    assert serialize(precision, ladder, rows, levels) == constant_tables(family).serialized


@pytest.mark.parametrize("family", coding.FAMILIES)
def test_constants_have_the_shape_of_their_densities(family):
    _, _, rows, levels = deserialize(constant_tables(family).serialized)
    widths = [len(frequencies) for _, frequencies in rows]
    assert widths == sorted(widths)
    for offset, frequencies in rows:
        inside = frequencies[:-1]
        assert len(inside) == 1 - 2 * offset and sum(frequencies) == 1 << 14 and min(frequencies) >= 1
        assert all(abs(a - b) <= 1 for a, b in zip(inside, inside[::-1], strict=True))
        half = inside[-offset:]
        assert all(a >= b - 1 for a, b in pairwise(half))
    assert [shift for _, shift in levels] == sorted(shift for _, shift in levels)


def test_allocation_is_the_best_there_is():
    g = random.Random(3)
    for _ in range(60):
        total, count = g.choice([6, 9, 12]), g.choice([2, 3, 4])
        masses = [g.choice([0, 1, 5, g.randint(0, 1000)]) for _ in range(count)]

        def cost(frequencies, masses=masses):
            return -sum(m * math.log(f) for m, f in zip(masses, frequencies, strict=True))

        def all_of(parts, left):
            if parts == 1:
                yield [left]
                return
            for f in range(1, left - parts + 2):
                yield from ([f, *rest] for rest in all_of(parts - 1, left - f))

        found = _allocate.allocate(masses, total)
        assert sum(found) == total and min(found) >= 1
        assert cost(found) <= min(map(cost, all_of(count, total))) + 1e-9


def test_logarithms_are_exact():
    for f in (1, 2, 3, 1000, 16384):
        assert abs(_allocate.log_step(f) / 2**96 - math.log1p(1 / f)) < 1e-15


def laplacian(width, length):
    v = torch.arange(length, dtype=torch.float64) - length // 2
    p = torch.exp(-(v.abs()) / width)
    return p / p.sum() * (1 - 1e-6)


def test_factorized_tables_code_within_their_entropy():
    widths = [0.05, 0.5, 3.0, 40.0, 400.0]
    p = torch.stack([laplacian(width, 6001) for width in widths])
    first = torch.tensor([-3000, -2990, -3000, -3000, -3000])
    tables = factorized_tables(p, first)
    assert len(tables) == 5 and tables.ladder == -1
    g = torch.Generator().manual_seed(0)
    for c in range(5):
        symbols = (torch.multinomial(p[c], 40_000, replacement=True, generator=g) + first[c]).int()
        symbols[0] = -(2**31)
        indexes = torch.full_like(symbols, c)
        stream = encode(symbols, indexes, tables)
        assert torch.equal(decode(stream, indexes, tables), symbols)
        ideal = -float(p[c][(symbols[1:] - first[c]).long()].log2().sum()) / 8
        assert len(stream) < 1.003 * ideal + 130
    again = factorized_tables(p, first)
    assert again == tables and hash(again) == hash(tables)


def test_factorized_tables_refuse_what_is_none():
    p, first = laplacian(1.0, 11)[None], torch.tensor([-5])
    for kind, text, call in [
        (TypeError, "float64 and an integer dtype", lambda: factorized_tables(p.float(), first)),
        (ValueError, r"\[C, L\] and \[C\] are needed", lambda: factorized_tables(p, torch.tensor([1, 2]))),
        (ValueError, "sum to 1 at most", lambda: factorized_tables(p * 2, first)),
        (ValueError, "sum to 1 at most", lambda: factorized_tables(p * torch.nan, first)),
        (ValueError, "precision must be 10 to 15", lambda: factorized_tables(p, first, precision=16)),
        (ValueError, "first must be -32768", lambda: factorized_tables(p, first + 40000)),
    ]:
        with pytest.raises(kind, match=text):
            call()


def test_joined_tables_code_several_kinds_in_one_stream():
    z = factorized_tables(laplacian(2.0, 101)[None].repeat(3, 1), torch.tensor([-50, -50, -50]))
    both = join_tables(z, constant_tables("gaussian"))
    assert (len(both), both.ladder) == (247, 3)
    encoder = coding.Encoder(both)
    steps = [
        (torch.tensor([1, -2, 70], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)),
        (torch.tensor([5, 0], dtype=torch.int32), torch.tensor([4.0, 0.2])),
    ]
    for step in steps:
        encoder.encode(*step)
    decoder = coding.Decoder(encoder.flush(), both)
    for symbols, indexes in steps:
        assert torch.equal(decoder.decode(indexes), symbols)
    decoder.finish()
    with pytest.raises(ValueError, match="one precision is needed"):
        join_tables(z, factorized_tables(laplacian(2.0, 101)[None], torch.tensor([-50]), precision=12))
    with pytest.raises(ValueError, match="these tables have no ladder"):
        encode(steps[1][0], steps[1][1], z)


def test_tables_travel_as_their_bytes():
    tables = constant_tables()
    assert pickle.loads(pickle.dumps(tables)) == tables and copy.deepcopy(tables) == tables
    assert Tables(tables.serialized) == tables and repr(tables) == f"Tables(244 levels, hash {tables.hash})"
    with pytest.raises(ValueError, match="unknown family, got 'cauchy'"):
        constant_tables("cauchy")


def changed(at, value):
    data = bytearray(constant_tables().serialized)
    data[at] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not a table set"),
        (changed(0, 0), "not a table set"),
        (changed(4, 9), "precision 10 to 15"),
        (changed(5, 1), "precision 10 to 15"),
        (changed(8, 0), "1 to 4000 rows"),
        (changed(16, 1), "a ladder has 244 levels"),
        (changed(19, 255), "a ladder has 244 levels"),
        (changed(22, 255), "rows of up to 255 symbols"),
        (constant_tables().serialized[:-1], "rows of up to 255 symbols"),
        (constant_tables().serialized[:100], "the rows are truncated"),
        (changed(20 + 4 * 116, 0), "sum to 16384"),
        (changed(-4, 116), "a level names a row below 116"),
        (changed(-2, 16), "a shift to 15"),
        (changed(-1, 1), "a level names"),
    ],
)
def test_what_is_no_table_set_is_refused(data, text):
    with pytest.raises(ValueError, match=text):
        Tables(data)
    with pytest.raises(TypeError, match="must be bytes, got bytearray"):
        Tables(bytearray(data))

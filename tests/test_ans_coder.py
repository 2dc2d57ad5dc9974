"""lic_fast.coding: CompressAI's bitstreams, byte for byte, and what becomes of damaged ones."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lic_fast
from lic_fast.codec import BitstreamError as CodecBitstreamError
from lic_fast.coding.compressai_format import BitstreamError, Decoder, Encoder, Tables, decode, encode
from lic_fast.functional import ans_decode_

ans = pytest.importorskip("compressai.ans")
USABLE = [b for b, why in lic_fast.explain("ans_coder_encode", "cpu", torch.int32).reasons.items() if why is None]
EVERY_BACKEND = pytest.mark.parametrize("backend", USABLE)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def ints(values):
    return torch.tensor(list(values), dtype=torch.int32)


def random_tables(seed, rows=5, widest=300):
    g = random.Random(seed)
    cdfs = []
    for _ in range(rows):
        symbols = g.choice([2, 3, g.randint(2, widest)])
        cdfs.append([0, *sorted(g.sample(range(1, 65536), symbols - 1)), 65536])
    longest = max(map(len, cdfs)) + g.randint(0, 2)
    lengths = ints(map(len, cdfs))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in cdfs], dtype=torch.int32)
    return padded, lengths, ints(g.randint(-300, 300) for _ in cdfs)


def of_model(model):
    return model.quantized_cdf, model.cdf_length, model.offset


@pytest.fixture(scope="module")
def gaussian():
    from compressai.entropy_models import GaussianConditional

    model = GaussianConditional([0.11 * 1.13**i for i in range(64)])
    model.update()
    return of_model(model)


@pytest.fixture(scope="module")
def bottleneck():
    from compressai.entropy_models import EntropyBottleneck

    torch.manual_seed(0)
    model = EntropyBottleneck(24)
    model.update()
    return of_model(model)


def theirs(symbols, indexes, tables):
    lists = [t.tolist() for t in (symbols, indexes, *tables)]
    return ans.RansEncoder().encode_with_indexes(*lists)


def same_both_ways(symbols, indexes, raw):
    tables = Tables(*raw)
    stream = theirs(symbols, indexes, raw)
    assert encode(symbols, indexes, tables) == stream
    assert torch.equal(decode(stream, indexes, tables), symbols)
    lists = [t.tolist() for t in (indexes, *raw)]
    assert ans.RansDecoder().decode_with_indexes(encode(symbols, indexes, tables), *lists) == symbols.tolist()


CODEABLE = st.one_of(st.integers(-20, 20), st.integers(-4000, 4000), st.integers(-(2**26), 2**26))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_bytes_are_those_of_compressai(data):
    raw = random_tables(data.draw(st.integers(0, 2**32)))
    symbols = ints(data.draw(st.lists(CODEABLE, min_size=2, max_size=60)))
    rows = st.integers(0, len(raw[0]) - 1)
    same_both_ways(symbols, ints(data.draw(st.lists(rows, min_size=len(symbols), max_size=len(symbols)))), raw)


@pytest.mark.parametrize("kind", ["gaussian", "bottleneck"])
@pytest.mark.parametrize("count", [2, 3, 1000, 100_000])
@pytest.mark.parametrize("spread", [0.3, 5.0, 3000.0])
def test_bytes_with_the_tables_of_models(kind, count, spread, request):
    raw = request.getfixturevalue(kind)
    g = torch.Generator().manual_seed(count)
    indexes = torch.randint(len(raw[0]), (count,), generator=g, dtype=torch.int32)
    same_both_ways((torch.randn(count, generator=g) * spread).round().int(), indexes, raw)


def test_tables_of_every_width_code_every_symbol():
    widest = torch.arange(65537, dtype=torch.int32)[None]  # 65,536 symbols of frequency 1
    for raw in ((widest, ints([65537]), ints([7])), (ints([0, 65536])[None], ints([2]), ints([-3]))):
        tables = Tables(*raw)
        symbols = torch.cat(
            [torch.arange(-5, 66000, 7 if "cpp" in USABLE else 700, dtype=torch.int32), ints([INT_MIN, INT_MAX])]
        )
        indexes = torch.zeros_like(symbols)
        assert torch.equal(decode(encode(symbols, indexes, tables), indexes, tables), symbols)


@EVERY_BACKEND
@pytest.mark.parametrize("offset", [0, -5, 2**30, INT_MIN])
def test_escapes_of_every_size(backend, offset):
    raw = (ints([0, 30000, 60000, 65536])[None], ints([4]), ints([offset]))
    tables = Tables(*raw)
    powers = [s * 2**k + d for k in range(32) for s in (1, -1) for d in (-2, -1, 0, 1)]
    symbols = ints([0, *(p for p in powers if INT_MIN <= p <= INT_MAX), INT_MIN, INT_MAX])
    indexes = torch.zeros_like(symbols)
    with lic_fast.use_backend(backend):
        stream = encode(symbols, indexes, tables)
        assert torch.equal(decode(stream, indexes, tables), symbols)
    assert stream == encode(symbols, indexes, tables)
    if offset == 0:  # where CompressAI's encoder does not hang
        near = symbols[symbols.long().abs() < 2**27 - 8]
        same_both_ways(near, torch.zeros_like(near), raw)


@EVERY_BACKEND
@pytest.mark.parametrize("count", [0, 1])
def test_no_symbol_and_one(backend, count, gaussian):
    tables = Tables(*gaussian)
    symbols, indexes = ints([3] * count), ints([20] * count)
    with lic_fast.use_backend(backend):
        stream = encode(symbols, indexes, tables)
        assert torch.equal(decode(stream, indexes, tables), symbols)
    assert len(stream) >= 8 and (count or stream.hex() == "0000008000000000")
    # what CompressAI writes for a longer sequence ends in the same words
    longer = theirs(ints([3] * 2), ints([20] * 2), gaussian)
    assert len(stream) <= len(longer)


@EVERY_BACKEND
def test_backends_write_the_same_bytes(backend, gaussian):
    tables = Tables(*gaussian)
    g = torch.Generator().manual_seed(3)
    indexes = torch.randint(64, (4, 50), generator=g, dtype=torch.int32)
    symbols = (torch.randn(4, 50, generator=g) * 40).round().int()
    expected = theirs(symbols.flatten(), indexes.flatten(), gaussian)
    with lic_fast.use_backend(backend):
        assert encode(symbols, indexes, tables) == expected
        assert torch.equal(decode(expected, indexes, tables), symbols)
        assert torch.equal(decode(expected, indexes.t().contiguous().t(), tables), symbols)  # strided
        decoder, encoder = Decoder(expected, tables), Encoder(tables)
        for s, i in zip(symbols, indexes, strict=True):
            assert torch.equal(decoder.decode(i), s)
            encoder.encode(s, i)
        assert encoder.flush() == expected
        assert encoder.flush() == encode(ints([]), ints([]), tables)


@EVERY_BACKEND
def test_an_error_leaves_a_decoder_where_it_was(backend, gaussian):
    tables = Tables(*gaussian)
    indexes, symbols = ints([30] * 200), torch.arange(200, dtype=torch.int32) % 7
    with lic_fast.use_backend(backend):
        decoder = Decoder(encode(symbols, indexes, tables), tables)
        assert torch.equal(decoder.decode(indexes[:50]), symbols[:50])
        with pytest.raises(ValueError, match=r"indexes must be in \[0, 64\), got 30 to 64"):
            decoder.decode(ints([30, 64]))
        with pytest.raises(BitstreamError, match="runs out"):
            decoder.decode(ints([63] * 1000))
        assert torch.equal(decoder.decode(indexes[50:]), symbols[50:])


def test_damaged_streams_raise_or_decode_but_never_more(gaussian):
    tables, g = Tables(*gaussian), random.Random(5)
    indexes = torch.randint(64, (60,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    symbols = ints(g.choice([g.randint(-3, 3), g.randint(INT_MIN, INT_MAX)]) for _ in range(60))
    whole = encode(symbols, indexes, tables)
    outcomes = {"decoded": 0, "runs out": 0, "more than 32 bits": 0}
    for case in range(20_000 if "cpp" in USABLE else 300):
        data = bytearray(whole)
        if case % 3:
            for _ in range(1 + case % 4):
                data[g.randrange(len(data))] ^= 1 << g.randrange(8)
        if case % 3 != 1:
            data = data[: g.randrange(8, len(data))]
        try:
            assert len(decode(data, indexes, tables)) == 60
            outcomes["decoded"] += 1
        except BitstreamError as error:
            outcomes["runs out" if "runs out" in str(error) else "more than 32 bits"] += 1
    assert all(outcomes.values()), outcomes
    for length in range(len(whole)):  # every truncation loses a word that is needed
        with pytest.raises(BitstreamError, match="truncated" if length < 8 else "runs out"):
            decode(whole[:length], indexes, tables)
    assert BitstreamError is CodecBitstreamError


@EVERY_BACKEND
@pytest.mark.parametrize("nibbles", range(16))
def test_a_count_of_nibbles_that_no_encoder_writes(backend, nibbles):
    tables = Tables(ints([0, 1, 65536])[None], ints([3]), ints([0]))
    slot = 0xFFFF  # of the escape, frequency 65535: the state after it is (state >> 16) * 65535 + 65534
    high = next(h for h in range(1 << 40, (1 << 40) + 16) if (h * 65535 + slot - 1) & 15 == nibbles)
    with lic_fast.use_backend(backend):
        stream = (high << 16 | slot).to_bytes(8, "little") + bytes(range(1, 33))
        if nibbles <= 8:
            assert decode(stream, ints([0]), tables).shape == (1,)
        else:
            with pytest.raises(BitstreamError, match="more than 32 bits"):
                decode(stream, ints([0]), tables)


def test_decoding_runs_beside_other_threads(gaussian):
    tables = Tables(*gaussian)
    indexes = torch.full((20_000,), 40, dtype=torch.int32)
    symbols = torch.arange(20_000, dtype=torch.int32) % 11 - 5
    stream, wrong = encode(symbols, indexes, tables), []
    work = [
        threading.Thread(target=lambda: wrong.append(not torch.equal(decode(stream, indexes, tables), symbols)))
        for _ in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert wrong == [False] * 8


@EVERY_BACKEND
def test_opcheck_and_compile(backend, gaussian):
    tables = Tables(*gaussian)
    own = (tables.cdfs, tables.lengths, tables.offsets, tables.packed)
    symbols, indexes = ints(range(-9, 9)), ints(range(18))
    stream = encode(symbols, indexes, tables)
    data = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    state = torch.tensor([int.from_bytes(stream[:8], "little", signed=True), 2, 0])
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.ans_coder_encode, (symbols, indexes, *own))
        torch.library.opcheck(torch.ops.lic_fast.ans_coder_decode_, (data, state.clone(), indexes, *own))
        whole = torch.compile(lambda: torch.ops.lic_fast.ans_coder_decode_(data, state, indexes, *own) + 1,
                              fullgraph=True, backend="aot_eager")  # fmt: skip
        assert torch.equal(whole(), symbols + 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c, n, o: (c.long(), n, o), TypeError, "cdfs must be one of int32"),
        (lambda c, n, o: (c[0], n, o), ValueError, "cdfs must be"),
        (lambda c, n, o: (c, n[:-1], o), ValueError, "lengths"),
        (lambda c, n, o: (c[:0], n[:0], o[:0]), ValueError, "a row and two columns"),
        (lambda c, n, o: (c, n * 0 + 1, o), ValueError, "lengths must be 2 to"),
        (lambda c, n, o: (c, n * 0 + c.shape[1] + 1, o), ValueError, "lengths must be 2 to"),
        (lambda c, n, o: (c + 1, n, o), ValueError, "got row 0"),
        (lambda c, n, o: (torch.where(c == 65536, 65535, c), n, o), ValueError, "strictly from 0 to 65536"),
        (lambda c, n, o: (torch.where(c == c[2, 1], c[2, 2], c), n, o), ValueError, "got row 2"),
        (lambda c, n, o: (3, n, o), TypeError, "must be a tensor, got int"),
    ],
)
def test_bad_tables_are_named(change, error, message):
    raw = [t.clone() for t in random_tables(4, rows=3)]
    raw[0], raw[1] = ints([[0, 9, 65536, 0], [0, 4, 65536, 0], [0, 30, 50, 65536]]), ints([3, 3, 4])
    raw[0] = torch.tensor([[0, 9, 65536, 0], [0, 4, 65536, 0], [0, 30, 50, 65536]], dtype=torch.int32)
    with pytest.raises(error, match=message) as caught:
        Tables(*change(*raw))
    assert "\n" not in str(caught.value)


@EVERY_BACKEND
@pytest.mark.parametrize("bad", [-1, 64, INT_MIN, INT_MAX])
def test_indexes_outside_are_refused_before_anything_is_coded(backend, bad, gaussian):
    tables = Tables(*gaussian)
    for place in (0, 7, 15):
        indexes = ints([3] * 16)
        indexes[place] = bad
        with lic_fast.use_backend(backend):
            with pytest.raises(ValueError, match=r"indexes must be in \[0, 64\)"):
                encode(torch.zeros_like(indexes), indexes, tables)
            with pytest.raises(ValueError, match=r"indexes must be in \[0, 64\)"):
                decode(encode(ints([0] * 16), ints([3] * 16), tables), indexes, tables)


def test_bad_arguments_are_named(gaussian):
    tables, zero = Tables(*gaussian), ints([0])
    for call, error, message in (
        (lambda: encode(zero.long(), zero, tables), TypeError, "symbols must be one of int32"),
        (lambda: encode(zero, ints([0, 0]), tables), ValueError, "indexes must have the shape"),
        (lambda: encode(zero, zero, gaussian), TypeError, "tables must be Tables"),
        (lambda: encode(zero.to("meta"), zero, tables), TypeError, "symbols must be on the CPU"),
        (lambda: decode("text", zero, tables), TypeError, "must be bytes, got str"),
        (lambda: decode(b"1234567", zero, tables), BitstreamError, "at least 8 bytes, got 7"),
        (lambda: decode(bytes(8), zero.float(), tables), TypeError, "indexes must be one of int32"),
        (lambda: Encoder(tables).encode(zero, ints([0, 0])), ValueError, "shapes must agree"),
        (lambda: Encoder(tables).encode(zero, zero.long()), TypeError, "int32 is needed"),
        (lambda: ans_decode_(zero, zero, [0], *tables._arguments), TypeError, "must be a tensor"),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

"""Streams of mixtures that every version decodes, here also by a decoder written from docs/BITSTREAM.md alone."""

from __future__ import annotations

import pytest
import torch
from rans_page import Mixtures, plain_decode
from rans_streams import EVERYONE, running

from lic_fast.coding import Decoder, Encoder, decode, encode, mixture_parameters, mixture_tables

EVERY = pytest.mark.parametrize("name", EVERYONE)
# name: (family, components, elements of each step or None, lanes, stream)
GOLDEN = {
    "one shot": (
        "gaussian",
        3,
        None,
        "auto",
        """
        4c4652010100e03d826442ad23cf0103040505634e0d040989924e00f499783f1f0096a0931b0bbf06c0c2ca608e747f94eafdcccf
        20ea7fffd5de4fe6ffe29683280a002a98cab5fce5cdd36b48afa58740d71c0c783c001dc02bb4f9f44294f7c006a35d3530034142
        f50403c1f8479a1f5ccf5980758c3f5af4d7e4c4a1cf703e89bf31800dee1a3b9221d3f0f67f78e9c1576726b780920f42624e1ea7
        2fb02569ff7c4c8a79b7fff79264013e9725d9e0041aa3fd7e00000000000000001329634c0000000006000000fbfa290004000000
        ba4f9fc800000000a2f3ba86040000000500000089689b08e7400c49
        """,
    ),
    "many lanes": (
        "laplace",
        1,
        None,
        64,
        """
        4c46520101057f7ea301c54a037f0203040505010d09040107040400de40e6b7e4eacc886873e8b05dee592e985e71e6aeee6436ee
        12b9c9e2fe4e4b2238bf93811fc0f88f03f900f0e302ae1d20ed07ef639d0c2903f6c70a28ffff3303badf03e481dc9f62c0f9898b
        b01e7ffc8f46d68aae1f00f3df077eb0a63c0c05e0fc7b400080c27f6c64c9aa009e00e5079cfeb5e609c03a8c6fce08003f1e0324
        f958bf95fc7fa1f74b0f000000f0f8011a27de23c7f63f40b10f0060050000d0d5537f0b000038000000d900706ee6e87ffce23f78
        0100005e010080b41f4ceeea09a2b3ffc7b1e38e88941f00d8c959fc0700200b000044fe0000bd000040ac7800006dfea5daf43d4a
        75efaf944ade03d17f8356bebe2859cd48707e2e66fd7ed3007800020007000c0000000000000000001329634c0000000006000000
        fbfa290004000000ba4f9fc800000000a2f3ba86040000000500000089689b0849777f45
        """,
    ),
    "steps": (
        "logistic",
        2,
        [7, 0, 90, 33],
        32,
        """
        4c46520101159cf8bd0403059c8f01048201043f13046c83df65210d0789515af2e46ca52efe660138e7d308d3676afcf7f703f8ff
        f3fc81ef1f314e750637c76c93f4190600d2f56ffeab2263da641ea600f0930f58e6e2419c6ef22100f84b38fd0dc2f1030c91bdfa
        b35a8a5fd8ffce11e4c314acd4aae7b9c0056800f80feb00e848000006c0a132a5da4af54cc3fd4c0a1def4f379294da2e3e407fde
        c79eff1b048378be7e98992859f90dcde971df707e3100d7180c00aa7ef7c0d8263b430bc2312e30691d009d63e2fff50463769a1f
        9afeb4d03fdae47423d9ba412e6ae0bfd31eb599af003ddab63f64412ca25eae7896fd7ef256c2ce07f20500bc8c9aff0000000000
        0000001329634c0000000006000000fbfa290004000000ba4f9fc800000000a2f3ba86040000000500000089689b08050000000300
        0000188ff7020500000005000000106017c1ea483388
        """,
    ),
    "sixteen components": (
        "gaussian",
        16,
        None,
        4,
        """
        4c4652010102e03d826442ad23cf010304050518460d04f7b093923f007977e03bdfe4af2a003322a55a687f5a404a350408b701ef
        6fffdbcca49539a281de7f501fcadfdec7627ce28e2a3d28934c30cdb8a513ec74b800d7f5b0513c089942f76e42fa0bbf7a004bc0
        80bf038169f14812b0c31d7b32637fa33fdaac766dbebd7089af31800040e2eb2ed27ffe12fe3e28beb778b7fca92d5fbdbf023b2f
        03279d547e26ff52b2dec0e17f7081116ffb7e00000000000000001329634c0000000006000000fbfa290004000000ba4f9fc80000
        0000a2f3ba86040000000500000089689b086d5cb758
        """,
    ),
    "nothing": (
        "gaussian",
        2,
        [],
        1,
        """
        4c4652010110e03d826442ad23cf01000000000000000000df781723
        """,
    ),
}
# scale, mean and weight of each of two components, and the integers they become
INTEGERS = {
    "gaussian": [
        [-2, 1934819333, 2560, 536872189, 3584, 1610614464],
        [-162, 2075197781, 153805, 536873444, 175514, 1610615910],
        [122944, -2136341505, 525520, 2145321152, 57856, 2166855],
        [-283, 2141200525, 72448, 3008, 72704, -2147480640],
        [999475200, -2130770945, 2097152, 1073748672, -2097152, 1073744064],
    ],
    "laplace": [
        [-5, 2052259851, 5632, 536872372, 6656, 1610614656],
        [-422, 2125529949, 420045, 536873631, 441754, 1610616115],
        [122944, -2136341505, 525520, 2145321344, 57856, 2167065],
        [-735, 2141200751, 188160, 3200, 188416, -2147480448],
        [999475200, -2130770945, 2097152, 1073748864, -2097152, 1073744256],
    ],
    "logistic": [
        [-6, 2069037069, 6656, 536872372, 7680, 1610614656],
        [-450, 2125530004, 448717, 536873631, 470426, 1610616115],
        [122944, -2136341505, 525520, 2145321344, 57856, 2167065],
        [-779, 2141200773, 199424, 3200, 199680, -2147480448],
        [999475200, -2130770945, 2097152, 1073748864, -2097152, 1073744256],
    ],
}


def elements(count, components):
    """Integers of every kind: shifts, sizes, forms, hints of a search, a weight of nothing, far means."""
    words = []
    for i in range(count):
        size, shift = 1 + i * 389 % 1023 if i % 5 else 1 + i % 7, (i * 5 % 16) if i % 3 == 0 else 0
        hint = i * 40503 % 65536
        words.append([(-1) ** i * (i**5 % 100003), size | shift << 12 | hint << 16])
        left = 1 << 15
        for c in range(components):
            weight = left if c == components - 1 else left * (i * 7 + c * 3) % 11 // 16 + left * (i % 4) // 5
            left -= weight
            mean = 1024 * (1 + (size * (2 * c + i % 3) // (2 * components + 1))) + i * 97 % 1024 - 512
            if i % 23 == 9:
                mean = (1 << 21) * (-1) ** c
            words[-1] += [mean, weight << 16 | (6 + (i + c) % 9) << 8 | i * 31 % 256]
    packed = [[signed(word) for word in element] for element in words]
    return torch.tensor(packed, dtype=torch.int32).reshape(count, 2 + 2 * components).t().contiguous()


def signed(word):
    word &= (1 << 32) - 1
    return word - (word >> 31 << 32)


def symbols_of(words):
    """About each element's range; every 19th far outside."""
    first, word, n = words[0].long(), words[1].long(), words.shape[1]
    i = torch.arange(n)
    size, shift = word & 0xFFF, word >> 12 & 15
    symbols = first + (((i * 2654435761 >> 9) % (size + 4)) << shift) + (i * 40503 % (1 << 15) & (1 << shift) - 1)
    symbols = torch.where(i % 19 == 11, (i * 0x9E3779B1 & 0xFFFFFFFF) - (1 << 31), symbols)
    return ((symbols + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)


def case_of(case):
    family, components, steps, lanes, text = GOLDEN[case]
    words = elements(100 if steps is None else sum(steps), components)
    return mixture_tables(family), words, symbols_of(words), steps, lanes, bytes.fromhex("".join(text.split()))


def made(tables, words, symbols, steps, lanes):
    if steps is None:
        return encode(symbols.view(4, 5, 5), words.view(-1, 4, 5, 5), tables, lanes=lanes)
    encoder = Encoder(tables, lanes=lanes)
    for step in zip(symbols.split(steps), words.split(steps, 1), strict=True):
        encoder.encode(*step)
    return encoder.flush()


@EVERY
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_streams(name, case):
    tables, words, symbols, steps, lanes, stream = case_of(case)
    with running(name):
        assert made(tables, words, symbols, steps, lanes) == stream
        if steps is None:
            assert torch.equal(decode(stream, words.view(-1, 4, 5, 5), tables).flatten(), symbols)
        else:
            decoder = Decoder(stream, tables)
            for part, expected in zip(words.split(steps, 1), symbols.split(steps), strict=True):
                assert torch.equal(decoder.decode(part), expected)
            decoder.finish()


@pytest.mark.parametrize("case", GOLDEN)
def test_a_decoder_written_from_the_page_reads_them(case):
    tables, words, symbols, steps, _, stream = case_of(case)
    given = Mixtures(tables.serialized, words.t().tolist())
    head, found = plain_decode(stream, given, [len(symbols)] if steps is None else steps)
    assert found == symbols.tolist()
    assert head == ([4, 5, 5] if steps is None else [len(steps), sum(steps)])
    assert stream[6:14].hex() == tables.hash


@EVERY
@pytest.mark.parametrize("family", INTEGERS)
def test_golden_integers(name, family):
    """From floats to integers: what streams of CompressAI-like models depend on."""
    floats = torch.tensor(FLOATS, dtype=torch.float32)  # [n, 3, 2]
    with running(name):
        found = mixture_parameters(*floats.permute(1, 2, 0), mixture_tables(family))
    assert found.t().tolist() == INTEGERS[family]


FLOATS = (
    ((0.11, 0.5), (0.0, 1.0), (0.25, 0.75)),
    ((3.7, 40.0), (-12.3, 8.9), (1.0, 3.0)),
    ((1e-3, 700.5), (123456.7, 123000.0), (0.999, 0.001)),
    ((64.0, 64.0), (-0.5, 0.5), (0.0, 2.0)),
    ((1e6, 2.0), (1e9, -1e9), (0.5, 0.5)),
)

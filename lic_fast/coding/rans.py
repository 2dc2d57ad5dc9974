"""Symbols to bytes and back in lic_fast's bitstream: at once, a batch at once, or step by step with one flush."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional.coding import BitstreamError
from ..functional.rans import rans_check, rans_decode_, rans_encode, rans_open, rans_reconstruct_
from ._allocate import ESCAPE_BITS
from ._serialize import LADDER_LEVELS, deserialize
from .mixtures import MixtureTables, mixture_bits
from .tables import Tables

AnyTables = Tables | MixtureTables
Stream = bytes | bytearray | memoryview | Tensor
_FIRST_KEY, _KEY_SHIFT = 1980, 19
_LANES_AT, _STREAMS_AT, _STEPS_AT, _ELEMENTS_AT, _DIMENSIONS_AT, _HEAD = 2, 3, 6, 7, 11, 32


def scale_indexes(scales: Tensor, *, first: int = 0) -> Tensor:
    """The levels of scales, int32 of their shape, on any device: integer operations on the bits of fp32, nothing else.

    first: the ladder's first level (Tables.ladder). Level 0 takes scales up to 0.11328125, 16 levels make an octave,
    the last of the 244 begins at 3968. encode() and decode() take scales themselves, which is faster.

    Raises TypeError for dtypes other than fp32: convert scales on the side that computes them, once.
    Source: our choice (docs/BITSTREAM.md, section 2).
    """
    if not isinstance(scales, Tensor) or scales.dtype is not torch.float32:
        got = scales.dtype if isinstance(scales, Tensor) else type(scales).__name__
        raise TypeError(f"scale_indexes: scales must be an fp32 tensor, got {got}; convert them with .float()")
    bits = scales.detach().contiguous().view(torch.int32)
    return (bits >> _KEY_SHIFT).sub_(_FIRST_KEY).clamp_(0, LADDER_LEVELS - 1).add_(first)


def _checked(function: str, tables: object) -> AnyTables:
    if not isinstance(tables, AnyTables):
        raise TypeError(
            f"{function}: tables must be lic_fast.coding.Tables or MixtureTables, got {type(tables).__name__}"
        )
    return tables


def _shape(function: str, indexes: object, tables: AnyTables, batch: int = 0) -> torch.Size:
    """The shape of the symbols that indexes, or a mixture's parameters, belong to; `batch` sides come before."""
    if not isinstance(indexes, Tensor):
        raise TypeError(f"{function}: a tensor is needed, got {type(indexes).__name__}")
    if isinstance(tables, Tables):
        return indexes.shape
    if indexes.dim() <= batch:
        sides = "[B, 2 + 2 K, *]" if batch else "[2 + 2 K, *]"
        raise ValueError(f"{function}: parameters must be {sides}, got {list(indexes.shape)}; use mixture_parameters")
    return indexes.shape[:batch] + indexes.shape[batch + 1 :]


def _rows(indexes: Tensor, tables: AnyTables, shape: torch.Size, samples: int, batch: int) -> Tensor:
    """Indexes as [B, N], or parameters as [B, 2 + 2 K, N], for symbols of a shape without B."""
    planes = () if isinstance(tables, Tables) else (indexes.shape[batch],)
    return indexes.reshape(samples, *planes, shape.numel())


def _tensors(function: str, symbols: object, indexes: object, tables: AnyTables, batch: int = 0) -> None:
    if not (isinstance(symbols, Tensor) and isinstance(indexes, Tensor)):
        raise TypeError(f"{function}: tensors are needed, got {type(symbols).__name__} and {type(indexes).__name__}")
    if symbols.shape != _shape(function, indexes, tables, batch):
        raise ValueError(
            f"{function}: shapes must agree, got {list(symbols.shape)} and {list(indexes.shape)}; expand one"
        )


def _uint8(function: str, stream: Stream) -> Tensor:
    if isinstance(stream, Tensor):
        return stream
    if not isinstance(stream, (bytes, bytearray, memoryview)):
        raise TypeError(f"{function}: a stream is bytes or a uint8 tensor, got {type(stream).__name__}")
    data = bytearray(stream)
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def encode(symbols: Tensor, indexes: Tensor, tables: AnyTables, *, lanes: int | str = "auto", skip: int = 0) -> bytes:
    """The container of all symbols.

    symbols int32 of any shape (up to 8 sides), any values, on the CPU or a GPU; beside them indexes of the same shape:
    fp32 scales (for tables with a ladder), or int32 or uint8 levels; for MixtureTables, indexes are the int32
    [2 + 2 K, *] of mixture_parameters. lanes: how many chains are interleaved, a power of two up to 32 or a multiple of
    32; each 32 can be decoded by a thread or a warp of its own, and costs 55 to 60 bytes. skip: elements in the first
    `skip` levels of the ladder must be 0, and are not coded.

    Raises ValueError for shapes, lanes, indexes outside the tables and skipped symbols that are not 0; TypeError for
    dtypes and devices; BackendError for a forced backend.
    Source: docs/BITSTREAM.md.
    """
    _checked("encode", tables)
    _tensors("encode", symbols, indexes, tables)
    rows = _rows(indexes, tables, symbols.shape, 1, 0)
    stream, _ = rans_encode(
        symbols.reshape(1, symbols.numel()), rows, tables.packed_on(symbols.device), shape=symbols.shape, lanes=lanes,
        skip=skip,
    )  # fmt: skip
    return stream.cpu().numpy().tobytes()


def encode_batch(
    symbols: Tensor, indexes: Tensor, tables: AnyTables, *, lanes: int | str = "auto", skip: int = 0
) -> list[bytes]:
    """A container for each of B samples, of symbols and indexes [B, *] (parameters [B, 2 + 2 K, *]), in one call.

    Raises what encode raises.
    """
    _checked("encode_batch", tables)
    if isinstance(symbols, Tensor) and symbols.dim() < 1:
        raise ValueError("encode_batch: symbols must be [B, *], got no dimension; use encode")
    _tensors("encode_batch", symbols, indexes, tables, 1)
    if len(symbols) == 0:
        return []
    shape = symbols.shape[1:]
    rows = _rows(indexes, tables, shape, len(symbols), 1)
    stream, lengths = rans_encode(
        symbols.reshape(len(symbols), shape.numel()), rows, tables.packed_on(symbols.device), shape=shape, lanes=lanes,
        skip=skip,
    )  # fmt: skip
    data, ends = stream.cpu().numpy().tobytes(), lengths.cumsum(0).tolist()
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def decode(stream: Stream, indexes: Tensor, tables: AnyTables, *, check: bool = True) -> Tensor:
    """The symbols of a container, int32 of the shape of indexes, which must be those that it was encoded with.

    They are decoded where the indexes are, on the CPU or a GPU, to which bytes are moved. For MixtureTables, indexes
    are parameters [2 + 2 K, *], and symbols are [*].

    check: whether the CRC is looked at. Without it damage may go unseen, but nothing worse happens.

    Raises BitstreamError, naming what is wrong; ValueError for indexes outside the tables; TypeError for dtypes and
    devices; BackendError for a forced backend. Source: docs/BITSTREAM.md.
    """
    return _decode("decode", [stream], indexes, tables, 0, check)


def decode_batch(streams: Sequence[Stream], indexes: Tensor, tables: AnyTables, *, check: bool = True) -> Tensor:
    """The symbols of B containers, int32 [B, *], of indexes [B, *] (parameters [B, 2 + 2 K, *]), in one call.

    Raises what decode raises.
    """
    if indexes.dim() < 1 or len(streams) != len(indexes):
        raise ValueError(f"decode_batch: {len(streams)} streams need indexes [B, *], got {list(indexes.shape)}")
    return _decode("decode_batch", streams, indexes, tables, 1, check)


def _decode(
    function: str, streams: Sequence[Stream], indexes: Tensor, tables: AnyTables, batch: int, check: bool
) -> Tensor:
    packed, device = _checked(function, tables).packed, indexes.device
    whole = _shape(function, indexes, tables, batch)
    shape = whole[batch:]
    data = [_uint8(function, stream) for stream in streams]
    states = [rans_open(stream.cpu(), packed, check=check) for stream in data]
    for state in states:
        head = state[:_HEAD].tolist()
        held = head[_DIMENSIONS_AT + 1 : _DIMENSIONS_AT + 1 + max(0, head[_DIMENSIONS_AT])]
        if head[_DIMENSIONS_AT] < 0 or held != list(shape):
            what = f"{head[_ELEMENTS_AT]} symbols in {head[_STEPS_AT]} steps" if head[_DIMENSIONS_AT] < 0 else f"{held}"
            raise BitstreamError(
                f"{function}: the stream holds {what}, the indexes are {list(shape)}; pass its indexes"
            )
    data, states = _moved(data, device), _moved(states, device)
    rows = _rows(indexes, tables, shape, len(data), batch)
    symbols = rans_decode_(data, states, rows, tables.packed_on(device), last=True).view(whole)
    if device.type != "cpu":
        rans_check(states)
    return symbols


def _moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """On `device`, in one copy."""
    if all(tensor.device == device for tensor in tensors):
        return tensors
    return list(torch.cat([tensor.cpu() for tensor in tensors]).to(device).split([*map(len, tensors)]))


class Encoder:
    """Collects the steps of a stream and codes them all at once, backwards, with one flush.

    lanes, skip: as in encode; skip is for all steps. Steps are copied: their tensors may be reused.

    Raises TypeError where tables are not Tables. Source: docs/BITSTREAM.md.
    """

    def __init__(self, tables: AnyTables, *, lanes: int | str = "auto", skip: int = 0) -> None:
        self._tables, self._lanes, self._skip = _checked("Encoder", tables), lanes, skip
        self._steps: list[tuple[Tensor, Tensor]] = []

    def encode(self, symbols: Tensor, indexes: Tensor) -> None:
        """Appends a step: int32 symbols and indexes (fp32 scales, int32 or uint8 levels) of one shape.

        For MixtureTables, indexes are parameters [2 + 2 K, *], of one K in all steps. Raises ValueError where the
        shapes differ or scales meet tables without a ladder, TypeError for dtypes; indexes are checked by flush.
        """
        _tensors("Encoder.encode", symbols, indexes, self._tables)
        if symbols.dtype is not torch.int32:
            raise TypeError(f"Encoder.encode: symbols must be int32, got {symbols.dtype}; convert them")
        levels = _levels("Encoder.encode", indexes, self._tables)
        if self._steps and len(self._steps[0][1].shape) == 2 and len(self._steps[0][1]) != len(levels):
            raise ValueError(
                f"Encoder.encode: all steps need as many components, got {len(levels) // 2 - 1} after "
                f"{len(self._steps[0][1]) // 2 - 1}; give those that lack a weight of 0"
            )
        self._steps.append((symbols.detach().flatten().clone(), levels))

    def flush(self) -> bytes:
        """The container of all steps so far, and starts anew. Raises what encode raises."""
        planes = () if isinstance(self._tables, Tables) else (4,)
        steps = self._steps or [(torch.empty(0, dtype=torch.int32), torch.empty((*planes, 0), dtype=torch.int32))]
        symbols, indexes = (torch.cat([step[i] for step in steps], -1)[None] for i in range(2))
        stream, _ = rans_encode(
            symbols, indexes, self._tables.packed_on(symbols.device), steps=[len(step[0]) for step in self._steps],
            lanes=self._lanes, skip=self._skip,
        )  # fmt: skip
        self._steps.clear()
        return stream.cpu().numpy().tobytes()


def _levels(function: str, indexes: Tensor, tables: AnyTables) -> Tensor:
    if isinstance(tables, MixtureTables):
        if indexes.dtype is not torch.int32:
            raise TypeError(f"{function}: parameters must be int32, got {indexes.dtype}; use mixture_parameters")
        return indexes.detach().flatten(1).clone()
    if indexes.dtype is torch.float32:
        if tables.ladder < 0:
            raise ValueError(f"{function}: these tables have no ladder for scales; pass levels")
        return scale_indexes(indexes, first=tables.ladder).flatten()
    if indexes.dtype not in (torch.int32, torch.uint8):
        raise TypeError(f"{function}: indexes must be fp32, int32 or uint8, got {indexes.dtype}; convert them")
    return indexes.detach().flatten().to(torch.int32, copy=True)


class Decoder:
    """Decodes the stream of an Encoder step by step, in the encoder's order.

    check: as in decode. device: where the indexes will be; by default the stream's, the CPU for bytes. On a GPU steps
    wait for nothing and allocate their results only, so that a CUDA graph can hold them; what goes wrong is said by
    finish(), and symbols mean nothing before that.

    Raises BitstreamError, naming what is wrong with the stream; TypeError for what is no stream.
    Source: docs/BITSTREAM.md.
    """

    def __init__(
        self, stream: Stream, tables: AnyTables, *, check: bool = True, device: torch.device | str | None = None
    ) -> None:
        data, self._tables = _uint8("Decoder", stream), _checked("Decoder", tables)
        state = rans_open(data.cpu(), tables.packed, check=check)
        if int(state[_DIMENSIONS_AT]) >= 0:
            raise BitstreamError("Decoder: the stream was not made step by step; use decode")
        self.steps, self.elements = int(state[_STEPS_AT]), int(state[_ELEMENTS_AT])
        self.bytes = data.numel()
        self._stream = data.to(data.device if device is None else device)
        self._state, self._packed = state.to(self._stream.device), tables.packed_on(self._stream.device)

    def decode(self, indexes: Tensor) -> Tensor:
        """The symbols of the next step, int32 of the shape of its indexes (of parameters [2 + 2 K, *], that of *).

        Raises BitstreamError where the stream runs out, ValueError for indexes outside the tables, TypeError for dtypes
        and devices. After an error the decoder is of no more use.
        """
        shape = _shape("Decoder.decode", indexes, self._tables)
        rows = _rows(indexes, self._tables, shape, 1, 0)
        return rans_decode_([self._stream], [self._state], rows, self._packed, last=False).view(shape)

    def reconstruct_(
        self, indexes: Tensor, means: Tensor | None, values: Tensor, *, places: Tensor | None = None
    ) -> Tensor:
        """Writes the values of the next step, symbols plus means, into `values`, fp32, and returns it.

        indexes, means fp32 (or None) of the shape of values, which is contiguous. places int32 [n], each once: of the n
        elements of the step, in the flattened values; None: the step is all of them.

        Raises what decode raises; ValueError for places outside and values that are not contiguous.
        """
        if not isinstance(values, Tensor) or not values.is_contiguous():
            raise ValueError("Decoder.reconstruct_: values must be a contiguous tensor; write into a contiguous one")
        row = (1, values.numel())
        rans_reconstruct_(
            [self._stream], [self._state], indexes.reshape(row), self._packed,
            None if means is None else means.reshape(row), values.view(row), places=places, last=False,
        )  # fmt: skip
        return values

    def finish(self) -> None:
        """Checks that every step was decoded and nothing is left over: the whole stream vouches for its symbols.

        Raises BitstreamError where that is not so, on a GPU ValueError for indexes that were outside the tables too.
        """
        self._end()
        rans_check([self._state])

    def _end(self) -> None:
        planes = () if isinstance(self._tables, Tables) else (4,)
        none = torch.empty((1, *planes, 0), dtype=torch.int32, device=self._stream.device)
        rans_decode_([self._stream], [self._state], none, self._packed, last=True)


@dataclasses.dataclass(frozen=True)
class RateReport:
    """What a container's bits are spent on. All in bits; estimated_bits is what was passed in, or None."""

    symbols: int
    estimated_bits: float | None
    table_bits: float  # the ideal length under the integer tables, plain bits and escape values included
    stream_bits: int  # real
    header_bits: int  # with directory, pad and check
    lane_bits: int  # the flushed states; most of these are symbols' bits too
    escapes: int

    @property
    def overhead_bits(self) -> float:
        """Real bits beyond table_bits."""
        return self.stream_bits - self.table_bits

    def __str__(self) -> str:
        rows = [
            ("estimated", self.estimated_bits),
            ("ideal under the tables", self.table_bits),
            ("real", self.stream_bits),
        ]
        rows += [("of these header", self.header_bits), ("of these states", self.lane_bits)]
        n = max(1, self.symbols)
        lines = [
            f"{name:>24} {bits / 8:14.1f} bytes {bits / n:9.5f} bits a symbol"
            for name, bits in rows
            if bits is not None
        ]
        return "\n".join([f"{self.symbols} symbols, {self.escapes} escapes", *lines])


def rate_report(
    symbols: Tensor,
    indexes: Tensor,
    tables: AnyTables,
    stream: Stream,
    *,
    estimated_bits: float | None = None,
    skip: int = 0,
) -> RateReport:
    """Where the bits of a container go.

    symbols, indexes, tables, skip: what `stream` was encoded of. estimated_bits: what the model's likelihoods promise,
    if known (lic_fast.functional.gaussian_rate and others sum them).

    Raises what decode raises for the stream and its arguments. Source: our choice.
    """
    _tensors("rate_report", symbols, indexes, tables)
    data, symbols, indexes = (x.cpu() for x in (_uint8("rate_report", stream), symbols, indexes))
    state = rans_open(data, _checked("rate_report", tables).packed)
    levels = _levels("rate_report", indexes, tables)
    price = _table_bits if isinstance(tables, Tables) else mixture_bits
    bits, escaped = price(symbols.flatten(), levels, tables)
    ladder = tables.ladder
    coded = ~((levels >= ladder) & (levels < ladder + skip)) if skip else torch.ones_like(escaped)
    bits = bits + ESCAPE_BITS * escaped
    lanes, streams = int(state[_LANES_AT]), int(state[_STREAMS_AT])
    per_stream = state[_HEAD:].view(streams, -1)
    states = per_stream[:, 8:].contiguous().view(torch.int32)[:, :lanes].long() & 0xFFFFFFFF
    lane_bits = 4 * lanes * streams + int(states.double().log2().floor().sum())
    payload = 16 * int(per_stream[:, 1].sum()) + 8 * int((per_stream[:, 3] * per_stream[:, 4]).sum())
    real = 8 * data.numel()
    return RateReport(
        symbols.numel(), estimated_bits, float(bits[coded].sum()), real, real - payload - lane_bits, lane_bits,
        int((escaped & coded).sum()),
    )  # fmt: skip


def _table_bits(symbols: Tensor, levels: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """(the ideal length of each symbol, plain bits included but no escape values; which escape)."""
    levels = levels.long()
    precision, _, rows, pairs = deserialize(tables.serialized)
    costs = torch.full((len(rows), 256), 0.0, dtype=torch.float64)
    for i, (_, frequencies) in enumerate(rows):
        costs[i, : len(frequencies)] = precision - torch.tensor(frequencies, dtype=torch.float64).log2()
    row, shift = (torch.tensor(pairs)[levels, i] for i in range(2))
    offset = torch.tensor([offset for offset, _ in rows])[row]
    size = torch.tensor([len(frequencies) - 1 for _, frequencies in rows])[row]
    number = ((symbols.long() + (1 << shift >> 1)) >> shift) - offset
    escaped = (number < 0) | (number >= size)
    return costs[row, torch.where(escaped, size, number)] + shift, escaped

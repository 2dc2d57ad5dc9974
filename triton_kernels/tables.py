"""Tables of pointers on the device, so that one launch walks a whole list of tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

_CACHE: OrderedDict[tuple, Tensor] = OrderedDict()
_CAPTURED: dict[tuple, Tensor] = {}
_CACHED_NUMBERS = 1 << 23  # 64 MiB in all


def _on_another_stream(key: tuple) -> Tensor:
    """The table that a warm-up outside the capture's own stream has made; the capture waits for its writer anyway."""
    for other, table in (*_CAPTURED.items(), *_CACHE.items()):
        if other[:-1] == key[:-1]:
            return table
    raise RuntimeError("a CUDA graph is being captured and these tensors were never launched; launch once before")


def pointer_table(rows: Sequence[tuple[int, ...]], sizes: Sequence[int], block: int, device: torch.device) -> Tensor:
    """A table for a launch over all blocks of all tensors, [blocks, 2 + columns] int64 on `device`.

    rows: one tuple of pointers (and codes) for each tensor; sizes: their numbers of elements. Row b of the result
    is what program b needs: the first element, the number of elements, then its tensor's row. Tables are kept,
    since an optimizer asks for the same one at every step; a pointer is only a key here, so a table stays right
    for whatever tensor lies at those addresses. Each stream has its own, so that a table is never read before it is
    written or after its memory has gone to something else. One that a CUDA graph was captured with is kept for good.
    A table cannot be made while a graph is captured: launch once before.
    """
    on_cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
    key = (tuple(rows), tuple(sizes), block, device, stream)
    table = _CACHE.get(key)
    if on_cuda and torch.cuda.is_current_stream_capturing():
        table = table if table is not None else _on_another_stream(key)
        _CAPTURED[key] = table
        return table
    if table is None:
        counts = torch.tensor([-(-size // block) for size in sizes])
        which = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        first = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
        columns = [first * block, torch.tensor(sizes)[which]]
        columns += list(torch.tensor(rows, dtype=torch.int64)[which].unbind(1))
        table = torch.stack(columns, 1).contiguous().to(device)
        _CACHE[key] = table
        while len(_CACHE) > 1 and sum(t.numel() for t in _CACHE.values()) > _CACHED_NUMBERS:
            _CACHE.popitem(last=False)
    else:
        _CACHE.move_to_end(key)
    return table

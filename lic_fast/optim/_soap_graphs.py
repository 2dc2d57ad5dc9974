"""SOAP's steps recorded as CUDA graphs: one for an ordinary step, one for each set of parameters that refreshes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """Runs work that reads gradients from fixed places, and from its second run on replays it.

    The first run of each kind of work is an ordinary one: it makes the kernels' tables, the libraries' handles and
    their workspaces, which a capture cannot make. All graphs share one pool: none leaves anything in it for another.
    A parameter that has moved (`p.data = ...`) makes all recordings void.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._grads = [torch.empty_like(p) for p in params]
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._places: list[int] = []

    def gradients(self) -> list[Tensor]:
        """The gradients of now, copied to where the recorded work reads them."""
        torch._foreach_copy_(self._grads, [p.grad for p in self._params])
        return self._grads

    def run(self, kind: Hashable, work: Callable[[], None]) -> None:
        """Does `work`, which must be the same for the same `kind`. Within a capture of the caller's it is just done."""
        places = [p.data_ptr() for p in self._params]
        if places != self._places:
            self._places = places
            self._seen.clear()
            self._recorded.clear()
        if kind not in self._seen or torch.cuda.is_current_stream_capturing():
            self._seen.add(kind)
            work()
            return
        graph = self._recorded.get(kind)
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            if not self._recorded:  # a pool dies with the last of its graphs
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool):
                work()
            self._recorded[kind] = graph
        graph.replay()
        torch.autograd.graph.increment_version(self._params)

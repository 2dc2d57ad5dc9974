"""What recording SOAP's steps as CUDA graphs relies on, shown without a GPU."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from lic_fast.optim import SOAP, _soap_batch, _soap_graphs, _soap_state


def parameter(*shape, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def train(optimizer, params, steps):
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.fixture
def recorder(monkeypatch):
    """Graphs that do their work once when recorded, and note replays."""
    noted = types.SimpleNamespace(pools=[], replays=0)

    class Graph:
        def replay(self):
            noted.replays += 1

    @contextlib.contextmanager
    def graph(recorded, pool=None):
        noted.pools.append(pool)
        yield

    for name, fake in (
        ("CUDAGraph", Graph), ("graph", graph), ("graph_pool_handle", object), ("is_current_stream_capturing", bool),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return noted


def test_graphs_share_a_pool_and_are_made_anew_where_a_parameter_has_moved(recorder):
    p = parameter(3)
    graphs, done = _soap_graphs.Graphs([p]), []
    for kind in "aabbab":
        graphs.run(kind, lambda kind=kind: done.append(kind))
    assert "".join(done) == "aabb" and recorder.replays == 4
    assert len(recorder.pools) == 2 and recorder.pools[0] is recorder.pools[1] is not None
    p.data = p.data.clone()
    for _ in range(2):
        graphs.run("a", lambda: done.append("moved"))
    assert done[4:] == ["moved", "moved"] and recorder.replays == 5
    assert recorder.pools[2] is not recorder.pools[0]


def test_recorded_steps_end_where_the_table_of_counts_moves():
    early, late = parameter(4, 3), parameter(5, 2, seed=1)
    optimizer = SOAP([early, late])
    train(optimizer, [early], 2)
    batches, table = optimizer._batches, optimizer._counts[early.device].table
    train(optimizer, [early], 1)
    assert optimizer._batches is batches and optimizer._counts[early.device].table is table
    train(optimizer, [early, late], 1)  # the first step of `late` makes room for it
    late.grad = None
    train(optimizer, [early], 1)
    assert optimizer._counts[early.device].table is not table and optimizer._batches is not batches
    assert optimizer.state[early]["step"] == 4


def test_copies_of_what_has_no_view_stay_in_their_place(monkeypatch):
    seen = []

    def spy(params, grads, *args, **settings):
        seen.append([t.data_ptr() for t in (*params, *grads)])
        return step(params, grads, *args, **settings)

    step = _soap_batch.soap_update_
    monkeypatch.setattr(_soap_batch, "soap_update_", spy)
    p = parameter(6, 4, 3, 3)
    p.data = p.data.to(memory_format=torch.channels_last)  # I, kh and kw, which are merged, do not lie together
    before = p.detach().clone()
    optimizer = SOAP([p], merge_dims=True, max_precond_dim=40)
    kept = torch.empty_like(p)
    for _ in range(4):
        p.grad = kept.copy_(torch.randn_like(p))
        optimizer.step()
        keep = torch.empty(1000)  # noqa: F841 the allocator gives other addresses
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    assert p.data_ptr() not in seen[0] and not torch.equal(p, before)


def test_a_refresh_sends_no_table_that_it_has_sent_before(monkeypatch):
    params = [parameter(6, 4, seed=i) for i in range(4)]
    optimizer = SOAP(params, precondition_frequency=3, stagger=True)
    train(optimizer, params, 7)

    def refuse(self, places):
        assert places in self.picked, "a table is made anew"
        return self.picked[places]

    monkeypatch.setattr(_soap_state.FactorStack, "rows", refuse)
    before = optimizer.refreshed_matrices
    train(optimizer, params, 6)
    assert optimizer.refreshed_matrices - before == 16


def test_eigenvectors_are_not_recorded(recorder, monkeypatch):
    p = parameter(5, 4)
    optimizer = SOAP([p], precondition_frequency=1, refresh="eigh")
    train(optimizer, [p], 2)
    graphs = _soap_graphs.Graphs([p])
    optimizer._graphs, kinds = graphs, []
    monkeypatch.setattr(graphs, "run", lambda kind, work: (kinds.append(kind), work()))
    train(optimizer, [p], 2)
    assert kinds == [(), ()] and optimizer.refreshed_matrices == 6

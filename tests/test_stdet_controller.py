"""lic_fast.optim.STDET around ordinary optimizers: schedule, steps, moments, resumption."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_fast.functional import FlatLayout, affine_reconstruct
from lic_fast.optim import SOAP, STDET
from lic_fast.optim._stdet_schedule import Schedule, paper_dummy

pytest.importorskip("scipy")
STEPS = 6  # an epoch
ADAM = {"lr": 1e-2}


def network(dtype=torch.float32, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 12, 3), torch.nn.Tanh(), torch.nn.Conv2d(12, 14, 3), torch.nn.Tanh()]
    net = torch.nn.Sequential(*layers, torch.nn.Conv2d(14, 3, 3)).to(dtype)
    return net.to(memory_format=memory_format)


def backward(net, epoch, step):
    p = next(net.parameters())
    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(100 * epoch + step)).to(p.dtype)
    loss = (net(x) - 0.5 * x[:, :, 3:-3, 3:-3]).square().mean()
    loss.backward()
    return loss.item()


def run_epoch(net, stdet, clip=True):
    losses = []
    for step in range(STEPS):
        stdet.zero_grad()
        losses.append(backward(net, stdet.epoch, step))
        stdet.after_backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        stdet.step()
    return losses


def make(net, optimizer=torch.optim.Adam, **options):
    chosen = dict(warmup_epochs=4, true_per_epoch=0.05, samples=200, modes=5)
    return STDET(net, optimizer(net.parameters(), **ADAM), **{**chosen, **options})


def codes(stdet):
    """(mode, tied, stateless) of all weights, in flat order without padding."""
    code = torch.cat(stdet._layout.split(stdet._embedding.code))
    return (code & FlatLayout.OUTSIDE), code & FlatLayout.TIED != 0, code & FlatLayout.STATELESS != 0


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@given(st.integers(2, 40), st.integers(1, 60), st.integers(1, 4), st.floats(0, 1), st.floats(0, 0.2),
       st.floats(0, 0.1), st.floats(0, 1), st.integers(1, 10**7), st.sampled_from(["global", "warmup"]))  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_the_schedule_keeps_its_caps(warmup, more, period, embeddable, true, rate, most, weights, origin):
    schedule = Schedule(warmup, period, embeddable, true, lambda t: min(rate * t, most), origin)
    room, before = int(embeddable * weights), 0
    for epoch in range(1, warmup + more + 1):
        event = schedule.event(epoch)
        assert (event > 0) == (epoch > warmup and (epoch - warmup) % period == 0)
        if event:
            now = schedule.true_target(event, weights, room)
            dummies = schedule.dummies(epoch, weights, room, now)
            assert before <= now <= room and 0 <= dummies <= room - now
            assert now <= event * true * weights + 0.5
            before = now


@pytest.mark.parametrize(("warmup", "epochs", "true"), [(20, 70, 0.50), (10, 50, 0.40)])
def test_the_papers_numbers_come_out(warmup, epochs, true):
    weights = 1_000_003
    schedule = Schedule(warmup, 1, 0.75, 0.01, paper_dummy, "global")
    counts = {}
    for epoch in range(warmup + 1, epochs + 1):
        embedded = schedule.true_target(schedule.event(epoch), weights, int(0.75 * weights))
        counts[epoch] = embedded, schedule.dummies(epoch, weights, int(0.75 * weights), embedded)
        assert sum(counts[epoch]) <= 0.75 * weights
    assert counts[epochs][0] == round(true * weights)
    assert counts[epochs][1] == min(round(0.25 * weights), int(0.75 * weights) - counts[epochs][0])
    assert counts[warmup + 1][1] == round(min(0.02 * (warmup + 1), 0.25) * weights)


OPTIONS = [{}, {"dummy_mode": "freeze_epoch"}, {"period": 2, "true_per_epoch": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sma", [None, (0.8, 4)])
def test_sets_at_every_epoch(options, sma):
    net = network()
    stdet = make(net, sma=sma, **options)
    before, weights = None, stdet.weights
    for epoch in range(1, 17):
        run_epoch(net, stdet)
        report = stdet.epoch_end()
        assert report.epoch == epoch
        if epoch < 4:
            assert report.true == report.dummy == report.embeddable == 0 and report.trainable_share == 1
            continue
        mode, tied, stateless = codes(stdet)
        assert (mode != FlatLayout.OUTSIDE).sum() == report.embeddable == int(0.75 * weights)
        references = stdet._embedding.refs
        for tensor, element, slot in references.tolist():
            place = sum(stdet._layout.sizes[:tensor]) + element
            assert mode[place] == FlatLayout.OUTSIDE and not tied[place]
            assert slot == (~stateless[:place]).sum()
        assert stateless.sum() == report.true <= report.embeddable
        assert (tied & ~stateless).sum() == (report.dummy if options.get("dummy_mode") == "freeze_epoch" else 0)
        assert not (stateless & ~tied).any() and not (tied & (mode == FlatLayout.OUTSIDE)).any()
        assert report.true + report.dummy <= report.embeddable
        assert before is None or (stateless | ~before).all(), "the true set only grows"
        events = (epoch - 4) // options.get("period", 1)
        assert report.true == min(round(events * options.get("true_per_epoch", 0.05) * weights), report.embeddable)
        before = stateless
    assert report.true == report.embeddable or report.true == round(0.6 * weights)


@pytest.mark.parametrize("sma", [None, (1.0, 5)])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_nothing_embedded_and_alpha_one_is_the_plain_optimizer_to_the_bit(sma, optimizer):
    ours, theirs = network(), network()
    stdet = make(ours, optimizer, sma=sma, true_per_epoch=0.0, dummy=lambda t: 0.0)
    plain = optimizer(theirs.parameters(), **ADAM)
    for epoch in range(8):
        run_epoch(ours, stdet)
        stdet.epoch_end()
        for step in range(STEPS):
            plain.zero_grad()
            backward(theirs, epoch, step)
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            plain.step()
    assert torch.equal(flat(ours), flat(theirs))


@pytest.mark.parametrize("options", [
    {}, {"sma": (0.8, 4)}, {"gradient": "chain"}, {"continuity": True}, {"period": 2}, {"sma": (1.0, 4)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_the_fused_step_is_the_optimizers_own_with_masks(options, optimizer):
    """In fp64, where the two differ by rounding only: mask, step, average, rebuild against one pass."""
    fused, plain = network(torch.float64), network(torch.float64)
    ours, theirs = make(fused, optimizer, **options), make(plain, optimizer, fused=False, **options)
    for _ in range(12):
        run_epoch(fused, ours)
        run_epoch(plain, theirs)
        reports = ours.epoch_end(), theirs.epoch_end()
        assert (reports[0].true, reports[0].dummy) == (reports[1].true, reports[1].dummy)
    assert reports[0].fused and not reports[1].fused and reports[0].true > 0
    assert torch.equal(*(stdet._embedding.code for stdet in (ours, theirs)))
    torch.testing.assert_close(flat(fused), flat(plain), rtol=1e-9, atol=1e-11)
    if "sma" in options:
        slow = [torch.cat([s.flatten() for s in stdet.optimizer.slow_weights()]) for stdet in (ours, theirs)]
        torch.testing.assert_close(*slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"sma": (0.8, 4)}, {"optimizer": SOAP}, {"optimizer": SOAP, "sma": (0.8, 4)},
                                     {"optimizer": torch.optim.SGD}], ids=str)  # fmt: skip
def test_embedded_weights_follow_their_references_at_every_step(options):
    net = network()
    stdet = make(net, **options)
    for _ in range(7):
        run_epoch(net, stdet)
        stdet.epoch_end()
    e, moved = stdet._embedding, 0
    k, d, refs = e.k.clone(), e.d.clone(), stdet._embedding.reference_values(list(net.parameters()))
    mode, tied, _ = codes(stdet)
    embeddable = mode != FlatLayout.OUTSIDE
    for step in range(STEPS):
        stdet.zero_grad()
        backward(net, 7, step)
        stdet.after_backward()
        grads = torch.cat([p.grad.flatten() for p in net.parameters()])
        assert (grads[tied] == 0).all() and (grads[~tied] != 0).any()
        stdet.step()
        now = e.reference_values(list(net.parameters()))
        moved += int(not torch.equal(now, refs))
        line = k[tied[embeddable]] * now.float()[mode[tied].long()] + d[tied[embeddable]]
        assert torch.equal(flat(net)[tied], line)
    assert moved and tied.sum() == e.true > 0 and torch.equal(e.k, k)


def test_moments_of_embedded_weights_are_released():
    net = network()
    stdet = make(net, true_per_epoch=0.1)
    sizes = []
    for _ in range(9):
        run_epoch(net, stdet)
        report = stdet.epoch_end()
        sizes.append(report.state_bytes)
        if report.true:
            assert report.state_bytes == 8 * (report.weights - report.true)
            assert not stdet._inner.state
            assert stdet._adam.exp_avg.untyped_storage().nbytes() == report.state_bytes // 2
    assert sizes[3] == report.dense_state_bytes == 8 * stdet.weights and sizes[-1] <= 0.51 * sizes[0]


@pytest.mark.parametrize("options", [
    {}, {"sma": (0.8, 4)}, {"dummy_mode": "freeze_epoch", "sma": (0.8, 4)}, {"gradient": "overwrite"},
    {"period": 2}, {"snapshots": "exact"}, {"sensitivity": "random"}, {"optimizer": SOAP, "sma": (0.8, 4)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("at", [2, 4, 7])
def test_resume_is_bit_exact(options, at):
    net = network()
    stdet = make(net, **options)
    for _ in range(at):
        run_epoch(net, stdet)
        stdet.epoch_end()
    step = 3  # in the middle of the next epoch
    for number in range(step):
        stdet.zero_grad()
        backward(net, at, number)
        stdet.after_backward()
        stdet.step()
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "stdet": stdet.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network()
    again.load_state_dict(saved["model"])
    resumed = make(again, **options)
    resumed.load_state_dict(saved["stdet"])
    for a, b in ((net, stdet), (again, resumed)):
        for number in range(step, STEPS):
            b.zero_grad()
            backward(a, at, number)
            b.after_backward()
            b.step()
        b.epoch_end()
        for _ in range(3):
            run_epoch(a, b)
            b.epoch_end()
    assert torch.equal(flat(net), flat(again))
    assert str(stdet.report()) == str(resumed.report())


def test_a_copy_goes_on_by_itself():
    net = network()
    stdet = make(net, sma=(0.8, 4))
    for _ in range(6):
        run_epoch(net, stdet)
        stdet.epoch_end()
    pair = copy.deepcopy((net, stdet))
    run_epoch(*pair)
    before = flat(net).clone()
    run_epoch(net, stdet)
    assert torch.equal(flat(net), flat(pair[0])) and not torch.equal(flat(net), before)


def test_chain_sends_references_what_autograd_would():
    net = network(torch.float64)
    stdet = make(net, gradient="chain")
    for _ in range(7):
        run_epoch(net, stdet, clip=False)
        stdet.epoch_end()
    mode, tied, _ = codes(stdet)
    e = stdet._embedding
    k, d = (torch.zeros(len(mode)).double() for _ in range(2))
    k[mode != FlatLayout.OUTSIDE], d[mode != FlatLayout.OUTSIDE] = e.k, e.d
    refs = e.reference_values(list(net.parameters())).detach().requires_grad_()
    whole = affine_reconstruct(flat(net), k, d, torch.where(tied, mode, 0), refs, tied=tied)
    parts = whole.split(stdet._layout.sizes)
    names = [name for name, _ in net.named_parameters()]
    values = {n: v.view_as(p) for n, v, p in zip(names, parts, net.parameters(), strict=True)}
    x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(700)).double()
    (torch.func.functional_call(net, values, x) - 0.5 * x[:, :, 3:-3, 3:-3]).square().mean().backward()
    stdet.zero_grad()
    backward(net, 7, 0)
    own = torch.stack([list(net.parameters())[t].grad.flatten()[i] for t, i, _ in e.refs.tolist()])
    stdet.after_backward()
    got = torch.stack([list(net.parameters())[t].grad.flatten()[i] for t, i, _ in e.refs.tolist()])
    torch.testing.assert_close(got - own, refs.grad, rtol=1e-9, atol=1e-14)
    assert (got - own).abs().max() > 0


def test_continuity_leaves_a_weight_where_it_is_when_it_is_embedded():
    jumps = {}
    for continuity in (False, True):
        net = network(torch.float64)
        stdet = make(net, continuity=continuity, dummy=lambda t: 0.0)
        for _ in range(5):
            run_epoch(net, stdet)
            before = flat(net).clone()
            stdet.epoch_end()
        tied = codes(stdet)[1]
        jumps[continuity] = float((flat(net) - before).abs().max())
        assert tied.any() and torch.equal(flat(net)[~tied], before[~tied])
    assert jumps[True] < 1e-14 < jumps[False]


def test_overwrite_trains_all_and_sets_embedded_weights_at_the_end_of_the_epoch():
    net = network()
    stdet = make(net, gradient="overwrite")
    for _ in range(6):
        run_epoch(net, stdet)
        stdet.epoch_end()
    tied, e = codes(stdet)[1], stdet._embedding
    refs = e.reference_values(list(net.parameters())).float()
    start = flat(net)[tied].clone()
    run_epoch(net, stdet)
    assert not torch.equal(flat(net)[tied], start) and stdet.report().state_bytes == 8 * stdet.weights
    stdet.epoch_end()
    mode = codes(stdet)[0]
    within = tied[mode != FlatLayout.OUTSIDE]
    now = e.reference_values(list(net.parameters())).float()
    assert not torch.equal(now, refs)
    assert torch.equal(flat(net)[tied], e.k[within] * now[mode[tied].long()] + e.d[within])


def test_dummies_are_set_and_train_on_or_stand():
    for kind in ("project", "freeze_epoch"):
        net = network()
        stdet = make(net, dummy_mode=kind, true_per_epoch=0.0, dummy=lambda t: 0.25)
        for _ in range(5):
            run_epoch(net, stdet)
            stdet.epoch_end()
        tied = codes(stdet)[1]
        assert tied.sum() == (0 if kind == "project" else stdet.report().dummy)
        before = flat(net).clone()
        run_epoch(net, stdet)
        moved = flat(net) != before
        assert moved.float().mean() > 0.9  # dummies follow, or train
        first = codes(stdet)[1].clone()
        stdet.epoch_end()
        assert kind == "project" or not torch.equal(first, codes(stdet)[1]), "drawn anew"


def test_sensitivity_decides_who_is_never_embedded():
    net = network()
    stdet = make(net, embeddable=0.5)
    total = torch.zeros(stdet.weights)
    for epoch in range(4):
        for step in range(STEPS):
            stdet.zero_grad()
            backward(net, epoch, step)
            if epoch == 3:
                total += torch.cat([(p * p.grad).abs().flatten() for p in net.parameters()]).detach()
            stdet.after_backward()
            stdet.step()
        stdet.epoch_end()
    mode = codes(stdet)[0]
    embeddable = mode != FlatLayout.OUTSIDE
    references = [sum(stdet._layout.sizes[:t]) + i for t, i, _ in stdet._embedding.refs.tolist()]
    free = torch.ones(len(mode), dtype=torch.bool)
    free[references] = False
    assert embeddable.sum() == stdet.weights // 2
    assert total[embeddable].max() <= total[~embeddable & free].min()

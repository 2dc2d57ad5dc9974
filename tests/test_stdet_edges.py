"""lic_fast.optim.STDET where a loop, an optimizer or a file is not what it was: told in a line, or gone along with."""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import pickle

import pytest
import torch
from test_stdet_controller import ADAM, STEPS, backward, flat, make, network, run_epoch

from lic_fast.optim import SOAP, STDET
from lic_fast.training.plots import _plot_trajectories

pytest.importorskip("scipy")


def trained(epochs=6, optimizer=torch.optim.Adam, **options):
    """A network and its STDET after some epochs; four of them are the warm-up."""
    net = network()
    stdet = make(net, optimizer, **options)
    for _ in range(epochs):
        run_epoch(net, stdet)
        stdet.epoch_end()
    return net, stdet


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


@pytest.mark.parametrize("sma", [None, (0.8, 4)])
def test_the_optimizers_own_step_is_refused_once_its_moments_are_here(sma):
    net, stdet = trained(sma=sma)
    assert stdet.report().fused
    for a, b in ((net, stdet), copy.deepcopy((net, stdet))):
        if b is not stdet:
            run_epoch(a, b)  # torch copies an optimizer without its hooks
        backward(a, 9, 0)
        before = flat(a).clone()
        for optimizer in (b.optimizer, b._inner):
            with pytest.raises(RuntimeError, match=r"Adam.step was called.*call step\(\) of STDET") as caught:
                optimizer.step()
            assert "\n" not in str(caught.value)
        assert torch.equal(flat(a), before) and not b._inner.state


def test_an_earlier_state_gives_the_optimizer_its_own_step_back():
    net, stdet = trained(4)
    earlier, weights = copy.deepcopy((stdet.state_dict(), net.state_dict()))
    run_epoch(net, stdet)
    stdet.epoch_end()
    assert stdet.report().fused
    end = flat(net).clone()
    for _ in range(2):  # the second time into what the first left
        net.load_state_dict(weights)
        stdet.load_state_dict(copy.deepcopy(earlier))  # torch trains on the tensors it is given
        assert not stdet.report().fused and stdet.epoch == 4
        run_epoch(net, stdet)
        stdet.epoch_end()
        assert torch.equal(flat(net), end)


def test_a_state_loaded_past_stdet_is_told():
    net = network()
    plain = torch.optim.Adam(net.parameters(), **ADAM)
    backward(net, 0, 0)
    plain.step()
    net, stdet = trained()
    stdet._inner.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"loaded past STDET.*load_state_dict\(\) of STDET"):
        run_epoch(net, stdet)


def test_groups_of_now_are_read_after_the_optimizer_has_new_ones():
    net, stdet = trained()
    stdet.optimizer.load_state_dict(stdet.optimizer.state_dict())  # torch replaces its groups
    stdet.param_groups[0]["lr"] = 0.0
    before = flat(net).clone()
    run_epoch(net, stdet)
    assert stdet.report().fused and torch.equal(flat(net), before)


def hook(optimizer):
    optimizer.register_step_post_hook(lambda *told: None)


def tensor_rate(optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(ADAM["lr"], dtype=torch.float64)


@pytest.mark.parametrize("change", [hook, tensor_rate])
@pytest.mark.parametrize("fused", [False, True])
def test_what_the_fused_step_cannot_do_is_left_to_the_optimizer_with_its_moments(change, fused):
    ends = []
    for other in (change, None):
        net = network()
        adam = torch.optim.Adam(net.parameters(), fused=fused, **ADAM)
        stdet = STDET(net, adam, warmup_epochs=4, true_per_epoch=0.05, samples=200, modes=5)
        for _ in range(6):
            run_epoch(net, stdet)
            stdet.epoch_end()
        assert stdet.report().fused
        if other is not None:
            other(adam)
        run_epoch(net, stdet)
        assert stdet.report().fused == (other is None)
        ends.append(flat(net))
        assert other is None or adam.state[net[0].weight]["step"] == 7 * STEPS
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outer", [False, True])
def test_hooks_of_the_average_and_of_the_optimizer_run_on(outer):
    net, stdet = trained(sma=(0.8, 4))
    calls = []
    (stdet.optimizer if outer else stdet._inner).register_step_pre_hook(lambda *told: calls.append(1))
    run_epoch(net, stdet)
    assert len(calls) == STEPS


def test_parameters_that_come_later_are_trained():
    _, stdet = trained()
    assert stdet.report().fused
    late = torch.nn.Parameter(torch.ones(4))
    stdet.optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(4)
    stdet.after_backward()
    stdet.step()
    assert (late < 1).all()


def test_a_parameter_frozen_under_the_average_stands():
    net, stdet = trained(sma=(0.8, 4), dummy=lambda t: 0.0, true_per_epoch=0.01)
    assert stdet.report().fused
    run_epoch(net, stdet)
    bias = net[4].bias
    tied = stdet._layout.split(stdet._embedding.code)[-1] & 0x80 != 0
    bias.requires_grad_(False)
    bias.fill_(2.0)
    run_epoch(net, stdet)
    assert (bias[~tied] == 2.0).all() and len(bias[~tied]) > 0


def test_a_scheduler_of_the_average_does_not_warn_after_resumption(recwarn):
    net, stdet = trained(sma=(0.8, 4))
    resumed = make(net, sma=(0.8, 4))
    scheduler = torch.optim.lr_scheduler.StepLR(resumed.optimizer, 1)
    resumed.load_state_dict(stdet.state_dict())
    run_epoch(net, resumed)
    scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@pytest.mark.parametrize("epochs", [2, 6])
def test_closures_are_called_with_gradients_and_their_loss_returned(epochs):
    net, stdet = trained(epochs)
    twin, same = copy.deepcopy((net, stdet))

    def closure():
        same.zero_grad()
        loss = backward(twin, same.epoch, 0)
        same.after_backward()
        return loss

    stdet.zero_grad()
    loss = backward(net, stdet.epoch, 0)
    stdet.after_backward()
    assert stdet.step() is None and same.step(closure) == loss
    assert torch.equal(flat(net), flat(twin)) and same.report().fused == (epochs == 6)


def test_nothing_happens_while_the_parameters_hold_the_average():
    net, stdet = trained(sma=(0.8, 4))
    before, epoch, steps = flat(net).clone(), stdet.epoch, stdet.optimizer.steps
    with stdet.optimizer.swap():
        for call in (stdet.after_backward, stdet.step, stdet.epoch_end):
            with pytest.raises(RuntimeError, match=r"hold the slow weights; leave swap\(\) first"):
                call()
    assert torch.equal(flat(net), before) and (stdet.epoch, stdet.optimizer.steps) == (epoch, steps)


@pytest.mark.parametrize("convert", [lambda net: net.to(memory_format=torch.channels_last), lambda net: net.double()])
@pytest.mark.parametrize("epochs", [2, 6])
def test_a_model_that_is_converted_in_between_is_told(convert, epochs):
    net, stdet = trained(epochs)
    stdet.zero_grad()
    convert(net)
    for call in (stdet.after_backward, stdet.step, stdet.epoch_end):
        with pytest.raises(RuntimeError, match="dtype or memory format of a parameter has changed"):
            call()


def test_an_end_of_an_epoch_that_fails_changes_nothing():
    shares = [2.0, 0.1]
    net, stdet = trained(4, dummy=lambda t: shares[0])
    twin, same = copy.deepcopy((net, stdet))
    run_epoch(net, stdet)
    run_epoch(twin, same)
    with pytest.raises(ValueError, match="must be a share"):
        stdet.epoch_end()
    del shares[0]
    stdet.epoch_end()
    same.epoch_end()
    assert torch.equal(flat(net), flat(twin)) and torch.equal(stdet._embedding.k, same._embedding.k)
    assert len(stdet._snapshots.history) == 5


def test_gradients_that_are_all_absent_are_no_sensitivity():
    net, stdet = trained(3)
    stdet.zero_grad()
    stdet.after_backward()
    with pytest.raises(RuntimeError, match="no sensitivity was accumulated in epoch 4"):
        stdet.epoch_end()
    run_epoch(net, stdet)
    assert stdet.epoch_end().embeddable > 0


def test_sparse_gradients_are_told():
    net = torch.nn.Embedding(50, 20, sparse=True)
    stdet = STDET(net, torch.optim.SGD(net.parameters(), lr=0.1), samples=20)
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"gradients must be dense, got torch\.sparse_coo; give sparse=False"):
        stdet.after_backward()


def test_a_missing_scipy_is_told_at_the_start(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="clustering needs SciPy; run: pip install scipy"):
        make(network())


def test_a_checkpoint_of_the_warm_up_holds_the_epochs_so_far_and_no_more():
    net = torch.nn.Linear(256, 256)
    stdet = STDET(net, torch.optim.SGD(net.parameters(), lr=0.1), warmup_epochs=10**6, samples=10)
    places, sizes = stdet._layout.starts[-1], []
    for epoch in (1, 2, 3):
        stdet.epoch_end()
        sizes.append(through_a_file(stdet.state_dict())[1])
        assert stdet.report().host_bytes == (4 + 2 * epoch) * places + 8 * 10 * epoch
    assert all(2 * places <= b - a < 2 * places + 2000 for a, b in itertools.pairwise(sizes))


DAMAGE = [
    ("adam", lambda own: own["adam"].pop("counts")),
    ("adam", lambda own: own["adam"].update(exp_avg_sq=own["adam"]["exp_avg_sq"][:-1])),
    ("code", lambda own: own["embedding"].update(code=own["embedding"]["code"][:-1024])),
    ("k", lambda own: own["embedding"].update(k=own["embedding"]["k"][:-1])),
    ("places", lambda own: own["embedding"]["modes"].update(places=own["embedding"]["modes"]["places"] + 10**6)),
    ("snapshots", lambda own: own["snapshots"].pop("sample")),
    ("history", lambda own: own["snapshots"].update(history=own["snapshots"]["history"][:, 1:])),
    ("sensitivity", lambda own: own.update(sensitivity=torch.zeros(3))),
    ("epoch", lambda own: own.update(epoch=None)),
]


@pytest.mark.parametrize("damage", [act for _, act in DAMAGE], ids=[f"{i}-{n}" for i, (n, _) in enumerate(DAMAGE)])
def test_a_damaged_state_is_told_and_changes_nothing(damage):
    _, stdet = trained(7)
    saved, _ = through_a_file(stdet.state_dict())
    other, same = trained(6)
    kept = copy.deepcopy((other, same))
    damage(saved["stdet"])
    with pytest.raises(ValueError, match=r"STDET.load_state_dict: the state is damaged \(.+\); load one") as caught:
        same.load_state_dict(saved)
    assert "\n" not in str(caught.value)
    for a, b in ((other, same), kept):
        run_epoch(a, b)
        b.epoch_end()
    assert torch.equal(flat(other), flat(kept[0])) and str(same.report()) == str(kept[1].report())


def test_a_checkpoint_without_stdet_is_told():
    stdet = make(network())
    with pytest.raises(ValueError, match="not a state of STDET"):
        stdet.load_state_dict({"optimizer": {}, "stdet": None})


def test_a_fused_state_goes_on_where_the_fused_step_is_off_and_not_under_another_optimizer():
    net, stdet = trained(6)
    saved, _ = through_a_file(stdet.state_dict())
    again = network()
    again.load_state_dict(net.state_dict())
    resumed = make(again, fused=False)
    resumed.load_state_dict(saved)
    run_epoch(net, stdet)
    run_epoch(again, resumed)
    assert not resumed.report().fused and resumed.report().state_bytes == resumed.report().dense_state_bytes
    torch.testing.assert_close(flat(again), flat(net), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="the moments are Adam's, the optimizer is SOAP"):
        make(network(), SOAP).load_state_dict(saved)


def test_pickled_stdet_goes_on():
    net, stdet = trained(sma=(0.8, 4))
    other, same = pickle.loads(pickle.dumps((net, stdet)))
    for a, b in ((net, stdet), (other, same)):
        run_epoch(a, b)
        b.epoch_end()
    assert torch.equal(flat(net), flat(other)) and stdet.report().true == same.report().true


def test_coefficients_of_the_last_event_are_counted():
    _, stdet = trained(6, period=2)
    report = stdet.report()
    assert report.host_bytes == 8 * report.embeddable + 8 * 200 * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_state_loaded_onto_another_device_goes_on():
    net, stdet = trained(6, period=2)
    file = io.BytesIO()
    torch.save(stdet.state_dict(), file)
    file.seek(0)
    again = network()
    again.load_state_dict(net.state_dict())
    resumed = make(again, period=2)
    resumed.load_state_dict(torch.load(file, map_location="cuda", weights_only=True))
    for a, b in ((net, stdet), (again, resumed)):
        run_epoch(a, b)
        b.epoch_end()
    assert torch.equal(flat(net), flat(again))


def test_a_sample_of_references_alone_is_drawn_without_trajectories():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    _, stdet = trained(6, samples=1)
    told = stdet.trajectories()
    assert (told["mode"] < 0).all()
    _plot_trajectories(figure.subplots(1, 2), told, 4)


@pytest.mark.parametrize("late", [False, True])
def test_an_optimizer_that_is_already_under_way_keeps_its_moments(late):
    net = network()
    adam = torch.optim.Adam(net.parameters(), **ADAM)
    options = dict(warmup_epochs=4, true_per_epoch=0.05, samples=200, modes=5)
    stdet = None if late else STDET(net, adam, **options)
    for step in range(3):
        adam.zero_grad()
        backward(net, 0, step)
        (stdet or adam).step()
    stdet = stdet or STDET(net, adam, **options)
    for _ in range(6):
        run_epoch(net, stdet)
        stdet.epoch_end()
    assert stdet.report().fused and stdet._adam.counts == [3 + 6 * STEPS] * 6

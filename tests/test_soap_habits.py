"""SOAP keeps to the habits of torch's optimizers: edited groups, dropped state, hooks, errors that name the cause."""

from __future__ import annotations

import copy
from collections import defaultdict

import numpy
import pytest
import torch
from soap_training import give_gradients, parameters, tensors_of, train

from lic_fast.optim import SOAP


def moved(optimizer, params, what, seed):
    before = what.detach().clone()
    give_gradients(params, seed=seed)
    optimizer.step()
    return (what.detach() - before).abs().max().item()


def test_another_tensor_under_a_parameter_is_refused():
    """It would be walked with the strides of the old one, beyond its end."""
    a, b = parameters([(4, 5), (4, 5)], torch.float32)
    optimizer = SOAP([a, b])
    train(optimizer, [a, b], 2)
    a.grad, a.data = None, torch.randn(6, 5)
    a.grad = torch.randn(6, 5)
    with pytest.raises(RuntimeError, match=r"^SOAP: a parameter is another than .* got torch.float32 \[6, 5\]"):
        optimizer.step()
    a.grad, a.data = None, torch.randn(4, 5).bfloat16()
    a.grad = torch.randn(4, 5).bfloat16()
    with pytest.raises(RuntimeError, match="make a new optimizer"):
        optimizer.step()


def test_groups_may_be_edited():
    a, b, c = parameters([(4, 5), (4, 5), (4, 5)])
    optimizer = SOAP([{"params": [a], "lr": 0.0}, {"params": [b], "lr": 1.0}], weight_decay=0.0)
    train(optimizer, [a, b], 3)
    optimizer.param_groups.reverse()
    assert moved(optimizer, [a, b], a, 5) == 0.0 and moved(optimizer, [a, b], b, 6) > 0.0
    optimizer.param_groups.pop()  # the group of a
    optimizer.add_param_group({"params": [c], "lr": 0.0})
    a.grad = None
    assert moved(optimizer, [b, c], b, 7) > 0.0 and moved(optimizer, [b, c], c, 8) == 0.0
    assert moved(optimizer, [b, c], a, 9) == 0.0
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    assert moved(optimizer, [b, c], b, 10) == 0.0


def test_state_that_is_dropped_begins_anew():
    a, b = parameters([(4, 5), (4, 5)])
    optimizer = SOAP([a, b])
    train(optimizer, [a, b], 5)
    del optimizer.state[a]
    assert moved(optimizer, [a, b], a, 9) == 0.0  # a first step
    assert optimizer.state[a]["step"] == 0 and optimizer.state[b]["step"] == 5
    optimizer.state = defaultdict(dict)
    assert moved(optimizer, [a, b], b, 10) == 0.0 and len(optimizer.state) == 2
    replacement = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    optimizer.state.pop(a)
    optimizer.param_groups[0]["params"][0] = replacement
    train(optimizer, [replacement, b], 3)
    assert a not in optimizer.state and len(optimizer.state_dict()["state"]) == 2


def test_hooks_of_load_state_dict_see_and_change_the_whole_state():
    a, b = parameters([(4, 5), (4, 5)])
    optimizer, seen = SOAP([a, b]), []
    train(optimizer, [a, b], 4)
    saved = optimizer.state_dict()
    crossed = {"state": {0: saved["state"][1], 1: saved["state"][0]}, "param_groups": saved["param_groups"]}

    def straighten(_, state_dict):
        return {**state_dict, "state": {0: state_dict["state"][1], 1: state_dict["state"][0]}}

    twins = parameters([(4, 5), (4, 5)])
    other = SOAP(twins)
    other.register_load_state_dict_pre_hook(straighten)
    other.register_load_state_dict_post_hook(lambda opt: seen.append(len(opt.state)))
    other.load_state_dict(copy.deepcopy(crossed))
    assert seen == [2] and torch.equal(other.state[twins[0]]["exp_avg"], optimizer.state[a]["exp_avg"])
    other.load_state_dict(copy.deepcopy(crossed))
    assert seen == [2, 2]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.update(step="x"),
        lambda state: state.update(step=-1),
        lambda state: state.update(phase=[1]),
        lambda state: state.update(exp_avg=3),
        lambda state: state.update(GG=3),
        lambda state: state.update(GG=[g.to(torch.complex64) for g in state["GG"]]),
    ],
)
def test_a_damaged_state_changes_nothing(spoil):
    params = parameters([(3, 3), (4, 5)])
    optimizer = SOAP(params, lr=1e-3)
    train(optimizer, params, 5)
    before = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(before)
    damaged["param_groups"][0]["lr"] = 0.7
    spoil(damaged["state"][1])
    with pytest.raises(ValueError, match=r"SOAP.load_state_dict: the state of parameter 1 of group 0 does not fit"):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(after), tensors_of(before), strict=True))
    train(optimizer, params, 1)


def test_settings_that_shape_the_state_must_be_those_it_was_made_with():
    params = parameters([(4, 5)])
    optimizer = SOAP(params)
    train(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for change in ({"max_precond_dim": 4}, {"precondition": False}):
        saved["param_groups"][0] |= change
        with pytest.raises(ValueError, match="which the settings here do not make"):
            SOAP(parameters([(4, 5)])).load_state_dict(saved)
    optimizer.param_groups[0]["max_precond_dim"] = 4
    with pytest.raises(ValueError, match="SOAP: the copied state of parameter 0 of group 0 does not fit"):
        copy.deepcopy(optimizer)


def test_a_scalar_parameter_of_nikhilvyas_with_merging():
    a, b = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.randn(4, 5))
    optimizer = SOAP([a, b], merge_dims=True, max_precond_dim=4)
    train(optimizer, [a, b], 3)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] |= {"GG": [torch.ones(1, 1)], "Q": [torch.ones(1, 1)], "step": 2}
    SOAP([a, b], merge_dims=True, max_precond_dim=4).load_state_dict(saved)


def test_a_first_gradient_too_large_for_its_squares_is_skipped_and_remembered():
    a, b = parameters([(4, 5), (4, 5)], torch.float32)
    optimizer = SOAP([a, b])
    a.grad, b.grad = 1e30 * torch.randn(4, 5), torch.randn(4, 5)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and a not in optimizer.state and b in optimizer.state
    twin = copy.deepcopy(optimizer)
    other = SOAP(parameters([(4, 5), (4, 5)], torch.float32))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.skipped_steps == other.skipped_steps == 1
    train(optimizer, [a, b], 12)
    assert a.isfinite().all() and optimizer.state[a]["step"] == 11


def test_a_step_that_raises_is_no_step():
    a, b = parameters([(4, 5), (3,)])
    optimizer = SOAP([a, b], precondition_frequency=3)
    train(optimizer, [a, b], 2)
    give_gradients([a, b], seed=7)
    b.grad = b.grad.to_sparse()
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        optimizer.step()
    assert optimizer.state[a]["step"] == 1 and optimizer._slots[a].attempts == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precondition_frequency": 0}, "precondition_frequency must be a whole number"),
        ({"betas": (0.9, 1.5)}, "betas must be two numbers"),
        ({"lr": float("nan")}, "lr must be a finite number"),
    ],
)
def test_settings_are_looked_at_when_they_change(change, message):
    params = parameters([(4, 5), (3,)])
    optimizer = SOAP(params)
    train(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0].update(change)
    give_gradients(params, seed=9)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_tensor_settings_are_read_at_every_step():
    beta, eps = torch.tensor(0.9), torch.tensor(1e-8)
    params, twins = parameters([(4, 5), (3,)]), parameters([(4, 5), (3,)])
    optimizer, other = SOAP(params, betas=(beta, 0.95), eps=eps), SOAP(twins, betas=(0.9, 0.95), eps=1e-8)
    for t in range(6):
        if t == 3:
            beta.fill_(0.5)
            eps.fill_(0.25)
            other.param_groups[0].update(betas=(0.5, 0.95), eps=0.25)
        give_gradients(params, twins, seed=t)
        optimizer.step()
        other.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_numpy_numbers_and_one_element_tensors_are_numbers():
    params = parameters([(4, 5)])
    settings = {
        "lr": numpy.float32(1e-3),
        "precondition_frequency": numpy.int64(3),
        "weight_decay": torch.tensor([0.1]),
    }
    train(SOAP(params, **settings), params, 5)
    with pytest.raises(ValueError, match="lr must be a finite number"):
        SOAP(params, lr=torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda p: [p, p], ValueError, "a parameter stands twice in a group"),
        (lambda p: [torch.nn.Parameter(torch.zeros(1, 4).expand(3, 4))], ValueError, "elements share memory"),
        (lambda p: [("w", torch.nn.Parameter(torch.ones(2, 2, 2, 2, 2, 2)))], ValueError, "more than 5 axes"),
        (lambda p: [torch.nn.Parameter(torch.ones(3, 4).to(torch.float8_e4m3fn))], TypeError, "must be fp32, bf16"),
        (lambda p: [{"param": p}], TypeError, "must be a dict with 'params'"),
    ],
)
def test_parameters_that_are_refused(params, error, message):
    with pytest.raises(error, match=f"^SOAP: .*{message}") as caught:
        SOAP(params(torch.nn.Parameter(torch.ones(3, 4))))
    assert "\n" not in str(caught.value)
    for setting in ({"merge_dims": "no"}, {"stagger": "x"}):
        with pytest.raises(ValueError, match="must be True or False"):
            SOAP([torch.nn.Parameter(torch.ones(3, 4))], **setting)


def test_interleaved_elements_train_as_contiguous_ones():
    storage = torch.randn(20)
    p = torch.nn.Parameter(storage.as_strided((3, 2), (2, 3)))
    q = torch.nn.Parameter(p.detach().clone().contiguous())
    first, second = SOAP([p]), SOAP([q])
    for t in range(12):
        give_gradients([p], [q], seed=t)
        first.step()
        second.step()
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_capturable_changes_nothing_on_the_cpu():
    params, twins = parameters([(6, 5), (3,)]), parameters([(6, 5), (3,)])
    first, second = SOAP(params, capturable=True), SOAP(twins)
    for run, ps in ((first, params), (second, twins)):
        train(run, ps, 12)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))

"""SOAP shared among processes: the same training as in one, half of the work each, and an end that loses nothing."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_worker import STEPS, network, train

from lic_fast.optim import SOAP
from lic_fast.optim._soap_distributed import Shares
from lic_fast.optim._soap_plan import Plan, plan_of

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)


def launch(folder, world=2, die_at=-1):
    """(exit codes, what each rank wrote to stderr)."""
    ranks = []
    for rank in range(world):
        env = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name("distributed_worker.py")), str(folder), str(die_at)]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], errors


def alone(steps=range(STEPS)):
    model = network()
    optimizer = SOAP(model.parameters(), lr=1e-2, precondition_frequency=4)
    losses = train(model, optimizer, steps)
    return model, optimizer, losses


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes, errors = launch(folder)
    assert codes == [0, 0], errors
    told = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return folder, told, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_losses_and_weights_are_those_of_one_process_with_the_doubled_batch(two):
    _, told, weights = two
    model, _, losses = alone()
    means = [sum(pair) / 2 for pair in zip(*(t["losses"] for t in told), strict=True)]
    torch.testing.assert_close(torch.tensor(means), torch.tensor(losses), rtol=1e-5, atol=0)
    for name, value in model.state_dict().items():
        assert torch.equal(weights[0][name], weights[1][name])
        torch.testing.assert_close(weights[0][name], value, rtol=1e-5, atol=1e-7)


def test_each_rank_does_about_half_of_the_refreshing(two):
    _, told, _ = two
    _, optimizer, _ = alone()
    assert sum(t["matrices"] for t in told) == optimizer.refreshed_matrices > 0
    assert sum(t["flops"] for t in told) == optimizer.refreshed_flops
    assert sum(t["owned"] for t in told) == len(optimizer.state)
    assert all(0 < t["matrices"] < optimizer.refreshed_matrices for t in told)


def test_a_gathered_state_goes_on_in_one_process(two):
    folder, _, weights = two
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    model = network()
    model.load_state_dict(saved["model"])
    optimizer = SOAP(model.parameters(), lr=1e-2, precondition_frequency=4)
    optimizer.load_state_dict(saved["optimizer"])
    assert len(optimizer.state) == len(list(model.parameters()))
    train(model, optimizer, range(saved["step"], STEPS))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-5, atol=1e-7)


def test_a_state_of_one_process_goes_on_in_two(two, tmp_path):
    model, optimizer, _ = alone(range(13))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 13}
    torch.save(saved, tmp_path / "checkpoint.pt")
    codes, errors = launch(tmp_path, world=2)
    assert codes == [0, 0], errors
    resumed = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for name, value in two[2][0].items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-7)


def test_a_killed_rank_ends_the_other_with_an_error_and_leaves_the_checkpoint(tmp_path):
    codes, errors = launch(tmp_path, die_at=STEPS - 4)
    assert codes[1] < 0 and codes[0] > 0
    assert "RuntimeError" in errors[0] or "DistBackendError" in errors[0] or "Connection" in errors[0]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == STEPS // 2 + 1
    model = network()
    SOAP(model.parameters()).load_state_dict(saved["optimizer"])


def test_cannot_be_copied(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        optimizer = SOAP(network().parameters(), process_group=dist.group.WORLD)
        for copying in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled; use its state_dict"):
                copying(optimizer)
        assert optimizer.state_dict()["state"] == {}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("model", ["mbt2018-mean", "elic"])
@pytest.mark.parametrize("world", [2, 3])
def test_steps_and_refreshes_of_real_models_are_shared_evenly(model, world):
    models = pytest.importorskip("compressai.models")
    net = models.MeanScaleHyperprior(128, 192) if model == "mbt2018-mean" else models.Elic2022Official()
    params = [p for name, p in net.named_parameters() if not name.endswith("quantiles")]
    plans = [(p, plan_of(tuple(p.shape), True, False, False, 10000, False)) for p in params]
    shares = Shares.__new__(Shares)
    shares.size, shares._owner, shares._load = world, {}, [[0.0, 0.0] for _ in range(world)]
    shares.assign(plans)
    for count in (Plan.step_flops, Plan.refresh_flops):
        work = [sum(count(plan) for p, plan in plans if shares._owner[p] == rank) for rank in range(world)]
        assert max(work) <= 1.12 * sum(work) / world

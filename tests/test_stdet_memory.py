"""What STDET holds beside the optimizer, and the most that an end of an epoch takes for a while."""

from __future__ import annotations

import copy

import pytest
import torch
from lic_fast.benchmarks._memory import peak_allocated
from lic_fast.benchmarks.stdet_training import _Walk

from lic_fast.optim import STDET

pytest.importorskip("scipy")
SHAPES = [(192, 192, 3, 3), (192,)] * 10  # 3.3 M weights
SLACK = 4 << 20  # chunks of places, and single tensors


def test_peak_allocated_counts_what_is_held_at_once():
    def run(held):
        first = torch.ones(1 << 20)
        second = first + 1
        held.clear()
        del first
        return second, torch.ones(1 << 19)

    cpu = torch.device("cpu")
    assert peak_allocated(lambda: [torch.ones(1 << 22)], run, cpu) - (8 << 20) in range(64)
    assert peak_allocated(lambda: [], lambda held: None, cpu) == 0


@pytest.mark.parametrize("period", [1, 2])
def test_bytes_a_weight(period):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.05 * torch.randn(shape)) for shape in SHAPES]
    weights = sum(p.numel() for p in params)
    stdet = STDET(
        params, torch.optim.Adam(params, lr=1e-6), warmup_epochs=3, true_per_epoch=0.1 * period, samples=200,
        period=period, sma=(0.8, 2),
    )  # fmt: skip
    walk = _Walk(params)
    peaks, reports = [], []
    for _ in range(8):
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        stdet.after_backward()
        stdet.step()
        walk.advance()
        twin = copy.deepcopy((params, stdet))
        peaks.append(
            peak_allocated(lambda twin=twin: copy.deepcopy(twin), lambda pair: pair[1].epoch_end(), torch.device("cpu"))
        )
        reports.append(stdet.epoch_end())
    host = weights * (2 * 3 + 4)  # on the CPU the trajectories count too
    assert peaks[0] <= 6 * weights + SLACK and peaks[1] <= 2 * weights + SLACK
    assert reports[1].host_bytes <= host + 8 * 200 * 2 + 4 * 1024 * len(SHAPES) * 5
    assert peaks[2] <= 17 * weights  # 7 of them stay; the last sample, on the CPU, is 2
    assert reports[2].embedding_bytes <= 7.1 * weights <= 8 * weights
    for peak, report in zip(peaks[3:], reports[3:], strict=True):
        assert peak <= 6.1 * weights
        assert report.embedding_bytes == reports[2].embedding_bytes
    assert reports[-1].true == round(0.1 * (5 - (5 % period)) * weights)
    assert reports[-1].state_bytes == 8 * (weights - reports[-1].true) <= 0.61 * reports[-1].dense_state_bytes

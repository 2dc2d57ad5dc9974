"""What STDET embeds, for random settings, on weights that walk at random: the rules hold at every epoch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_fast.functional import FlatLayout
from lic_fast.optim import STDET

pytest.importorskip("scipy")

SETTINGS = st.fixed_dictionaries({
    "warmup_epochs": st.integers(2, 4), "period": st.integers(1, 3), "embeddable": st.floats(0, 1),
    "true_per_epoch": st.floats(0, 0.4), "modes": st.integers(1, 8), "samples": st.integers(1, 80),
    "sensitivity": st.sampled_from(["taylor", "fisher", "magnitude", "random"]),
    "dummy_mode": st.sampled_from(["project", "freeze_epoch"]), "gradient": st.sampled_from(["drop", "chain"]),
    "t_origin": st.sampled_from(["global", "warmup"]), "continuity": st.booleans(),
    "sma": st.sampled_from([None, (0.8, 2), (1.0, 1)]), "fused": st.sampled_from(["auto", False]),
    "snapshots": st.sampled_from(["bf16", "exact"]), "seed": st.integers(0, 3),
})  # fmt: skip


def marks(stdet):
    code = torch.cat(stdet._layout.split(stdet._embedding.code))
    tied, stateless = code & FlatLayout.TIED != 0, code & FlatLayout.STATELESS != 0
    return code & FlatLayout.OUTSIDE, tied, stateless


@given(SETTINGS, st.floats(0, 0.1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_the_rules_hold_at_every_epoch(options, rate, most):
    g = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((7, 11), (0,), (1,), (60, 3, 3), (9,))]
    weights = sum(p.numel() for p in params)
    optimizer = torch.optim.Adam(params, lr=1e-2)
    stdet = STDET(params, optimizer, dummy=lambda t: min(rate * t, most), **options)
    before, warmup = torch.zeros(weights, dtype=torch.bool), options["warmup_epochs"]
    for epoch in range(1, warmup + 8):
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g)
            stdet.after_backward()
            stdet.step()
        report = stdet.epoch_end()
        assert all(p.isfinite().all() for p in params)
        if epoch < warmup:
            continue
        mode, tied, stateless = marks(stdet)
        embeddable = mode != FlatLayout.OUTSIDE
        assert embeddable.sum() == report.embeddable <= int(options["embeddable"] * weights)
        assert report.embeddable >= min(int(options["embeddable"] * weights), weights - options["modes"])
        assert (mode[embeddable] < len(stdet._embedding.refs)).all()
        assert not (tied & ~embeddable).any() and not (stateless & ~tied).any()
        assert (before & ~stateless).sum() == 0, "what is embedded for good stays so"
        assert stateless.sum() == report.true and report.true + report.dummy <= report.embeddable
        past = (epoch - warmup) // options["period"]
        assert report.true == min(round(past * options["true_per_epoch"] * weights), report.embeddable)
        frozen = (tied & ~stateless).sum()
        assert frozen == (report.dummy if options["dummy_mode"] == "freeze_epoch" else 0)
        for tensor, element, _ in stdet._embedding.refs.tolist():
            place = sum(stdet._layout.sizes[:tensor]) + element
            assert not tied[place] and not embeddable[place], "a reference is never tied"
        if report.fused:
            assert report.state_bytes == 8 * (weights - report.true)
        before = stateless

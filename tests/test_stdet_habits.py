"""lic_fast.optim.STDET in other people's loops: schedulers, scalers, layouts, dtypes, groups; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from test_stdet_controller import ADAM, STEPS, backward, codes, flat, make, network, run_epoch

from lic_fast.functional import FlatLayout
from lic_fast.optim import SMA, SOAP, STDET, param_groups

pytest.importorskip("scipy")


def test_learning_rate_schedulers_work_on_the_optimizer(recwarn):
    net = network()
    stdet = make(net)
    scheduler = torch.optim.lr_scheduler.StepLR(stdet._inner, 1, gamma=0.5)
    for _ in range(7):
        run_epoch(net, stdet)
        stdet.epoch_end()
        scheduler.step()
    assert stdet.report().fused and stdet.param_groups[0]["lr"] == ADAM["lr"] / 2**7
    scheduler.optimizer.param_groups[0]["lr"] = 0.0
    before = flat(net).clone()
    run_epoch(net, stdet)
    assert torch.equal(flat(net), before)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_memory_formats_and_other_groups():
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = network(torch.float64, memory_format)
        optimizer = torch.optim.Adam(
            [{"params": list(net[0].parameters()), "lr": 1e-2}, {"params": net[2].parameters(), "lr": 3e-3},
             {"params": net[4].parameters(), "lr": 1e-2, "weight_decay": 0.1}]
        )  # fmt: skip
        fused = STDET(net, optimizer, warmup_epochs=3, true_per_epoch=0.1, samples=10**6, modes=5, sma=(0.8, 4))
        for _ in range(7):
            run_epoch(net, fused)
            report = fused.epoch_end()
        assert report.fused and report.true > 0
        results.append((flat(net), report.true))
    assert results[0][1] == results[1][1]
    # The same weights: their order in memory decides ties only, of which there are none.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-7, atol=1e-9)


def test_bf16_parameters_keep_fp32_state():
    net = network(torch.bfloat16)
    stdet = make(net, sma=(0.8, 4))
    for _ in range(7):
        losses = run_epoch(net, stdet)
        stdet.epoch_end()
    assert stdet._adam.exp_avg.dtype is stdet._embedding.k.dtype is torch.float32
    assert stdet.report().true > 0 and all(map(torch.isfinite, flat(net))) and losses[-1] < 0.2


def test_only_what_is_given_is_embedded():
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), **ADAM)
    stdet = STDET([net[2].weight], optimizer, warmup_epochs=3, true_per_epoch=0.2, samples=100, modes=4)
    for _ in range(7):
        run_epoch(net, stdet)
        stdet.epoch_end()
    mode, tied, _ = codes(stdet)
    inside = torch.cat([torch.full((p.numel(),), p is net[2].weight) for p in net.parameters()])
    assert stdet.weights == net[2].weight.numel() and tied.any()
    assert not tied[~inside].any() and (mode[~inside] == FlatLayout.OUTSIDE).all()
    before = flat(net).clone()
    run_epoch(net, stdet)
    assert (flat(net) != before)[~inside].float().mean() > 0.99


def test_quantiles_and_frozen_parameters_are_left_alone():
    models = pytest.importorskip("compressai.models")
    net = models.FactorizedPrior(8, 8)
    net.g_a[0].bias.requires_grad_(False)
    stdet = STDET(net, SOAP(param_groups(net), lr=1e-3), samples=50)
    names = {p: name for name, p in net.named_parameters()}
    told = {names[p] for p, mine in zip(stdet._params, stdet._controlled, strict=True) if mine}
    assert told == {n for n in names.values() if not n.endswith("quantiles") and n != "g_a.0.bias"}


def test_a_parameter_without_gradients_stands_and_its_tied_weights_follow():
    net = network()
    spare = torch.nn.Parameter(torch.randn(300))
    optimizer = torch.optim.Adam([*net.parameters(), spare], **ADAM)
    stdet = STDET([*net.parameters(), spare], optimizer, warmup_epochs=3, true_per_epoch=0.1, samples=100, modes=4)
    start = spare.detach().clone()
    for _ in range(7):
        run_epoch(net, stdet)
        stdet.epoch_end()
    assert stdet.report().fused and torch.equal(spare, start)  # it never moved: k = 0, d = its value
    assert (codes(stdet)[1][-300:]).any()


def test_gradients_that_are_not_finite_do_not_spoil_the_sensitivity():
    net = network()
    stdet = make(net)
    for _ in range(3):
        run_epoch(net, stdet)
        stdet.epoch_end()
    stdet.zero_grad()
    backward(net, 3, 0)
    next(net.parameters()).grad.fill_(float("inf"))
    stdet.after_backward()  # the loop then skips the step, as GradScaler does
    stdet.zero_grad()
    run_epoch(net, stdet)
    assert stdet._sensitivity.isfinite().all()
    assert stdet.epoch_end().embeddable == int(0.75 * stdet.weights)


def test_works_with_grad_scaler():
    net = network()
    stdet = make(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for epoch in range(7):
        for step in range(STEPS):
            stdet.zero_grad()
            p = next(net.parameters())
            x = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(100 * epoch + step))
            scaler.scale((net(x) - 0.5 * x[:, :, 3:-3, 3:-3]).square().mean()).backward()
            scaler.unscale_(stdet)
            stdet.after_backward()
            scaler.step(stdet)
            scaler.update()
        stdet.epoch_end()
    same, plain = network(), None
    plain = make(same)
    for _ in range(7):
        run_epoch(same, plain, clip=False)
        plain.epoch_end()
    assert p.grad is not None and torch.equal(flat(net), flat(same)) and stdet.report().fused


def test_zero_weights_samples_and_modes_at_the_edges():
    everything = {"embeddable": 1.0, "true_per_epoch": 1.0}
    few, many = {"samples": 1}, {"samples": 10**6}
    for options in ({"modes": 1}, {"modes": 63, "samples": 70}, few, many, everything, {"embeddable": 0.0}):
        net = network()
        stdet = make(net, **options)
        for _ in range(6):
            run_epoch(net, stdet)
            report = stdet.epoch_end()
        assert report.true + report.dummy <= report.embeddable
        assert torch.isfinite(flat(net)).all() and len(report.mode_sizes) <= options.get("modes", 5)


BAD = [
    ({"warmup_epochs": 1}, ValueError, "warmup_epochs must be a whole number >= 2, got 1"),
    ({"period": 0.5}, ValueError, "period must be a whole number"),
    ({"modes": 64}, ValueError, "modes must be at most 63, got 64"),
    ({"embeddable": 1.5}, ValueError, r"embeddable must be a share in \[0, 1\], got 1.5"),
    ({"true_per_epoch": float("nan")}, ValueError, "true_per_epoch must be a share"),
    ({"dummy": 0.25}, TypeError, "dummy must be a function from an epoch to a share, got float"),
    ({"sensitivity": "hessian"}, ValueError, "sensitivity must be one of 'taylor', 'fisher'"),
    ({"gradient": "stop"}, ValueError, "gradient must be one of 'drop', 'overwrite', 'chain', got 'stop'"),
    ({"gradient": "overwrite", "dummy_mode": "freeze_epoch"}, ValueError, "choose one"),
    ({"sma": 0.8}, TypeError, r"sma must be None or \(alpha, every\), got 0.8"),
    ({"sma": (1.5, 5)}, ValueError, r"alpha must be in \[0, 1\]"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message) as caught:
        make(network(), **options)
    assert "\n" not in str(caught.value)


def test_bad_parameters_are_named():
    net = network()
    optimizer = torch.optim.Adam(net[0].parameters(), **ADAM)
    with pytest.raises(ValueError, match="a parameter is not in the optimizer"):
        STDET(list(net.parameters()), optimizer)
    assert STDET(net, optimizer).weights == sum(p.numel() for p in net[0].parameters())
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Sequential"):
        STDET(net, net)
    with pytest.raises(TypeError, match="must be a module or tensors"):
        STDET([1.0], optimizer)
    with pytest.raises(ValueError, match="there is no weight"):
        STDET([], optimizer)
    mixed = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3).double())]
    with pytest.raises(TypeError, match="must share one floating dtype and one device"):
        STDET(mixed, torch.optim.Adam(mixed))
    strided = torch.nn.Parameter(torch.zeros(4, 4)[:, ::2])
    with pytest.raises(ValueError, match="is a strided view"):
        STDET([strided], torch.optim.Adam([strided]))
    with pytest.raises(TypeError, match="already averaged"):
        STDET(net, SMA(torch.optim.Adam(net.parameters())), sma=(0.8, 5))


def test_a_dummy_function_that_gives_no_share_is_told():
    net = network()
    stdet = make(net, dummy=lambda t: 2.0)
    for _ in range(4):
        run_epoch(net, stdet)
        stdet.epoch_end()
    run_epoch(net, stdet)
    with pytest.raises(ValueError, match=r"dummy\(5\) must be a share in \[0, 1\], got 2.0"):
        stdet.epoch_end()


def test_after_backward_that_is_never_called_is_told():
    net = network()
    stdet = make(net)
    for _ in range(3):
        stdet.epoch_end()
    with pytest.raises(RuntimeError, match=r"no sensitivity was accumulated in epoch 4.*after_backward"):
        stdet.epoch_end()
    with pytest.raises(RuntimeError, match="there are no modes before the warm-up ends"):
        stdet.trajectories()


@pytest.mark.parametrize(
    "change", [{"modes": 4}, {"gradient": "chain"}, {"warmup_epochs": 5}, {"sma": (0.8, 4)}], ids=str
)
def test_the_state_of_another_run_is_refused(change):
    net, other = network(), network()
    saved = make(net).state_dict()
    stdet = make(other, **change)
    before = stdet.epoch
    with pytest.raises(ValueError, match=r"STDET.load_state_dict: .* differs") as caught:
        stdet.load_state_dict(saved)
    assert "\n" not in str(caught.value) and stdet.epoch == before
    with pytest.raises(ValueError, match="not a state of STDET"):
        stdet.load_state_dict({"state": {}, "param_groups": []})
    small = torch.nn.Linear(3, 4)
    with pytest.raises(ValueError, match="shapes differs"):
        STDET(small, torch.optim.Adam(small.parameters()), warmup_epochs=4, true_per_epoch=0.05, samples=200,
              modes=5).load_state_dict(saved)  # fmt: skip

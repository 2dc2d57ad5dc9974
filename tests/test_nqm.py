"""`lic-fast bench nqm`: closed forms against an exact recursion, and the optimizers against the closed forms."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from lic_fast.benchmarks import nqm

from lic_fast import cli
from lic_fast.optim import SMA

GRID = [
    (curvature, alpha, every)
    for curvature in (0.1, 0.5, 1.0, 1.3, 1.9)
    for alpha, every in ((0.8, 5), (0.2, 5), (0.5, 1), (0.3, 2), (0.9, 7))
]


def maps(rho: float, alpha: float, every: int, reset: bool) -> tuple[np.ndarray, np.ndarray]:
    """The step and the average as matrices on (fast, slow)."""
    slow = [alpha, 1 - alpha]
    return np.diag([rho, 1.0]), np.array([slow if reset else [1.0, 0.0], slow])


def covariances(rho: float, alpha: float, every: int, reset: bool, noise: float) -> list[np.ndarray]:
    """Covariance of (fast, slow) in the steady state: right after an average, then after each step, before the next."""
    step, average = maps(rho, alpha, every, reset)
    start = np.zeros((2, 2))
    for _ in range(100_000):
        seen = [start]
        for _ in range(every):
            seen.append(step @ seen[-1] @ step.T + np.diag([noise, 0.0]))
        after = average @ seen[-1] @ average.T
        if np.abs(after - start).max() <= 1e-15 * np.abs(after).max():
            return [after, *seen[1:]]
        start = after
    raise AssertionError("no steady state")


@pytest.mark.parametrize(("curvature", "alpha", "every"), GRID)
def test_closed_forms_are_the_fixed_points_of_the_second_moments(curvature, alpha, every) -> None:
    lr, sigma, rho = 0.3, 1.7, 1 - curvature
    a = curvature / lr
    noise = (lr * a * sigma) ** 2
    beside = covariances(rho, alpha, every, False, noise)
    sgd = nqm.sgd_variance(lr, a, sigma)
    assert sgd == pytest.approx(beside[0][0, 0], rel=1e-10)
    assert nqm.ema_ratio(rho, alpha, every) == pytest.approx(beside[0][1, 1] / sgd, rel=1e-10)
    within = covariances(rho, alpha, every, True, noise)
    assert nqm.sma_ratio(rho, alpha, every) == pytest.approx(within[0][1, 1] / sgd, rel=1e-10)
    trained = [nqm.trained_ratio(rho, alpha, every, after) for after in range(every + 1)]
    assert trained == pytest.approx([c[0, 0] / sgd for c in within], rel=1e-10)
    r = rho**every  # as Zhang et al. write it
    published = alpha**2 * (1 - r**2) / (alpha**2 * (1 - r**2) + 2 * alpha * (1 - alpha) * (1 - r))
    assert nqm.sma_ratio(rho, alpha, every) == pytest.approx(published, rel=1e-10)


@pytest.mark.parametrize(("curvature", "alpha", "every"), GRID)
def test_decay_is_the_spectral_radius_of_a_cycle(curvature, alpha, every) -> None:
    for reset, decay in ((True, nqm.sma_decay), (False, nqm.ema_decay)):
        step, average = maps(1 - curvature, alpha, every, reset)
        cycle = average @ np.linalg.matrix_power(step, every)
        radius = np.abs(np.linalg.eigvals(cycle)).max()
        assert abs(decay(1 - curvature, alpha, every)) == pytest.approx(radius, rel=1e-10)


@pytest.mark.parametrize(("curvature", "alpha", "every"), GRID)
def test_a_slower_sgd_with_the_same_decay_has_no_more_variance_than_sma(curvature, alpha, every) -> None:
    rho = 1 - curvature
    slower = 1 - abs(nqm.sma_decay(rho, alpha, every)) ** (1 / every)  # its learning rate times the curvature
    expected = covariances(1 - slower, 1.0, 1, False, slower**2)[0][0, 0] / nqm.sgd_variance(1.0, curvature)
    assert nqm.slower_sgd_ratio(rho, alpha, every) == pytest.approx(expected, rel=1e-9)
    if every == 1:  # then SMA is SGD at the learning rate times alpha
        assert nqm.sma_ratio(rho, alpha, 1) == pytest.approx(expected, rel=1e-9)
    else:
        assert expected < nqm.sma_ratio(rho, alpha, every)


def test_known_values() -> None:
    sma = [nqm.sma_ratio(1 - curvature, 0.8, 5) for curvature in (0.1, 0.5, 1.0)]
    assert sma == pytest.approx([0.761, 0.673, 0.667], abs=5e-4)
    for weight, known in ((0.8, [0.845, 0.675, 0.667]), (0.2, [0.310, 0.117, 0.111])):
        ema = [nqm.ema_ratio(1 - curvature, weight, 5) for curvature in (0.1, 0.5, 1.0)]
        assert ema == pytest.approx(known, abs=5e-4)


@pytest.mark.parametrize(("alpha", "every", "curvatures"), [(0.8, 5, (0.1, 0.5, 1.0, 1.9)), (0.3, 2, (0.2, 1.5))])
def test_the_optimizers_have_the_variance_of_the_closed_forms(alpha, every, curvatures) -> None:
    problem = nqm.Problem(curvatures, alpha, every, coordinates=20_000, cycles=10, seed=1)
    measured = nqm.simulate(problem)
    assert len(measured) == 5 * len(curvatures)
    for m in measured:
        assert abs(m.difference) < 4, m
        assert m.standard_error < 0.01 * m.closed_form, "too coarse to tell a wrong closed form"
    by_name = {(m.curvature, m.method): m for m in measured}
    first = curvatures[0]
    sma, ema = by_name[first, nqm.Method("sma", alpha)], by_name[first, nqm.Method("ema", alpha)]
    assert abs(sma.simulated - ema.closed_form) > 4 * sma.standard_error
    assert abs(ema.simulated - sma.closed_form) > 4 * ema.standard_error


def test_the_standard_error_is_that_of_independent_runs() -> None:
    differences = []
    for seed in range(60):
        measured = nqm.simulate(nqm.Problem((0.3,), 0.8, 5, coordinates=500, cycles=4, seed=seed))
        differences += [m.difference for m in measured if m.method.name == "sma"]
    assert 0.7 < math.sqrt(np.mean(np.square(differences))) < 1.3  # 1 within 0.09 or so


def test_the_burn_in_forgets_the_start() -> None:
    for curvatures, alpha, every in (((0.02,), 0.8, 5), ((1.0,), 0.5, 3), ((1.95, 0.4), 0.1, 2)):
        problem = nqm.Problem(curvatures, alpha, every)
        factor = max(m.decay(1 - c, every) for m in problem.methods for c in curvatures)
        assert factor ** (2 * problem.burn_in) <= nqm.TRANSIENT < factor ** (2 * problem.burn_in - 2)


@pytest.mark.parametrize("curvature", [0.1, 1.0, 1.9])
def test_without_noise_the_mean_decays_as_said(curvature) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SMA(torch.optim.SGD([p], lr=nqm.LR), alpha=0.8, every=5)
    for _ in range(15):
        p.grad = p.detach() * (curvature / nqm.LR)
        optimizer.step()
    expected = nqm.sma_decay(1 - curvature, 0.8, 5) ** 3
    torch.testing.assert_close(optimizer.slow_weights()[0], torch.full_like(p, expected), rtol=1e-11, atol=1e-15)


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_rows_and_a_picture_and_prints_the_table(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    argv = ["bench", "nqm", "--quick", "--coordinates", "2000", "--curvatures", "1.5", "0.3", "--alpha", "0.7"]
    argv += ["--every", "3", "--seed", "4", "--output", str(tmp_path / "rows")]
    assert cli.main(argv) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[2:12]]
    rows = rows_of(tmp_path / "rows" / "nqm.csv")
    assert tuple(rows[0]) == nqm.COLUMNS and all(row["every"] == "3" and row["seed"] == "4" for row in rows)
    methods = [("sgd", "1"), ("sma", "0.7"), ("sma-trained", "0.7"), ("ema", "0.7"), ("ema", "0.3")]
    assert [(row["method"], row["weight"], row["lr_times_a"]) for row in rows] == [
        (*method, curvature) for curvature in ("0.3", "1.5") for method in methods
    ]
    for row, shown in zip(rows, table, strict=True):
        off = (float(row["simulated"]) - float(row["closed_form"])) / float(row["standard_error"])
        assert off == pytest.approx(float(row["difference"]), abs=0.02) and abs(off) < 4
        assert (row["backend"] == "") == (row["method"] == "sgd")
        assert [shown[0], shown[1]] == [row["lr_times_a"], row["method"]]
        columns = ("simulated", "closed_form", "difference", "decay")
        assert [float(cell) for cell in shown[-4:]] == pytest.approx([float(row[name]) for name in columns], abs=6e-5)
    assert float(rows[1]["closed_form"]) == pytest.approx(nqm.sma_ratio(0.7, 0.7, 3), rel=1e-5)
    assert (tmp_path / "rows" / "nqm.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(argv) == 0
    again = rows_of(tmp_path / "rows" / "nqm.csv")
    assert again[:10] == rows, "a run appends"
    assert [row["simulated"] for row in again[10:]] == [row["simulated"] for row in rows], "and repeats by its seed"


def test_a_variance_that_misses_its_closed_form_fails_the_run(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(nqm, "sma_ratio", nqm.ema_ratio)
    argv = ["--quick", "--curvatures", "0.1", "--output", str(tmp_path)]
    assert nqm.main(argv) == 1
    assert "sma 0.8 at 0.1 is -" in capsys.readouterr().err


def test_misuse_is_told(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    wrong = [["--alpha", "1"], ["--alpha", "nan"], ["--every", "0"], ["--curvatures", "2"], ["--curvatures", "-0.1"]]
    wrong += [["--curvatures", "1e-9"], ["--alpha", "1e-17"], ["--coordinates", "1"]]
    for argv in wrong:
        with pytest.raises(SystemExit) as exit_:
            nqm.main([*argv, "--output", str(tmp_path)])
        assert exit_.value.code == 2 and argv[0] in capsys.readouterr().err
    (tmp_path / "nqm.csv").write_text("something,else\n")
    small = ["--quick", "--coordinates", "100", "--curvatures", "1", "--output", str(tmp_path)]
    assert nqm.main(small) == 2
    error = capsys.readouterr().err
    assert "has other columns" in error and error.count("\n") == 1


def test_bench_names_it(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert "`nqm`" in capsys.readouterr().out

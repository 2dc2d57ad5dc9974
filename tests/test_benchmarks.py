"""The benchmarks: what they refuse, in which order they run, what they write."""

from __future__ import annotations

import csv
import importlib
import pkgutil
import sys
from pathlib import Path

import lic_fast.benchmarks
import pytest
import torch
from lic_fast.benchmarks import OPS, WHOLE, _contenders, _harness, _rows, parameters, plot
from lic_fast.benchmarks.__main__ import main
from torch import Tensor

pytestmark = pytest.mark.usefixtures("small_cache")
CPU = torch.device("cpu")


def small() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((8, 3, 5, 5), (8,), (1,), (300, 7))]


def settings(**options: object) -> _harness.Settings:
    return _harness.Settings(**{"models": {"small": small}, "repeats": 3, "ceiling_mib": 1, **options})


def group(**factors: float) -> _harness.Group:
    """Cases that multiply by 2 and then by their factor."""
    x = small()[0]

    def case(name: str, factor: float) -> _harness.Case:
        return _harness.Case(name, lambda: x * 2 * factor, lambda out: [out], 8 * x.numel(), x.numel())

    expected = _harness.Expected.of([x.double() * 2], [x * 2], [2 * _harness.magnitude(x)])
    cases = [case(name, factor) for name, factor in factors.items()]
    return _harness.Group("double", "plain", "small", "fp32", CPU, cases, expected)


def written(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves torch.compile out: its compile time is not what is tested."""
    for op in OPS:
        module = importlib.import_module(f"lic_fast.benchmarks.{op}")
        monkeypatch.setattr(module, "compile_why_not", lambda device: "left out by the test", raising=False)


def fake_op(monkeypatch: pytest.MonkeyPatch, made: _harness.Group) -> None:
    module = importlib.import_module("lic_fast.benchmarks.sma_update")
    monkeypatch.setattr(module, "groups", lambda settings: iter([made]))


def test_wrong_case_has_no_row_and_the_run_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_op(monkeypatch, group(wrong=1.01))
    argv = ["sma_update", "--quick", "--ceiling-mib", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert main(argv, {"small": small}) == 1
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert "REFUSED: wrong" in printed.out and "1 results are wrong" in printed.err

    fake_op(monkeypatch, group(right=1.0, wrong=1.01))
    assert main(argv, {"small": small}) == 1
    assert {row["backend"] for row in written(tmp_path / "sma_update.csv")} == {"right", _harness.CEILING}


def test_wrong_case_is_never_timed() -> None:
    outcome = _harness.run_group(group(right=1.0, wrong=1.01), settings())
    assert set(outcome.refused) == {"wrong"}
    assert "off by" in outcome.refused["wrong"]
    assert {result.case.backend for result in outcome.results} == {"right", _harness.CEILING}


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        [torch.full((8, 3, 5, 5), float("nan"))],
        [torch.ones(8)],
        [torch.ones(8, 3, 5, 5, dtype=torch.float64)],
    ],
    ids=["none", "nan", "shape", "dtype"],
)
def test_check_refuses_what_is_no_result(outputs: list[Tensor]) -> None:
    assert group(right=1.0).expected.complaint(outputs) is not None


def test_check_lets_rounding_through_and_one_wrong_element_not() -> None:
    expected = group(right=1.0).expected
    out = small()[0] * 2
    assert expected.complaint([out * (1 + 2**-23)]) is None
    out.view(-1)[17] += 1e-3
    assert expected.complaint([out]) is not None


def test_cases_take_turns_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []

    def case(name: str) -> _harness.Case:
        prepare = lambda: order.append(f"prepare {name}")  # noqa: E731
        return _harness.Case(name, lambda: order.append(name), lambda out: [], 1, 1, prepare)

    def timed(run) -> float:
        run()
        return float(len(order))

    samples = _harness.measure([case("a"), case("b")], 2, timed, flush=lambda: order.append("flush"), warmup=1)
    assert order == ["prepare a", "flush", "a", "prepare b", "flush", "b"] * 3
    assert samples == {"a": [9.0, 15.0], "b": [12.0, 18.0]}


def test_a_slow_case_is_timed_three_times() -> None:
    cases = [_harness.Case(name, lambda name=name: name, lambda out: [], 1, 1) for name in ("slow", "fast")]
    samples = _harness.measure(cases, 6, lambda run: 6000.0 if run() == "slow" else 1.0)
    assert {name: len(taken) for name, taken in samples.items()} == {"slow": 3, "fast": 6}


def test_percentiles_on_a_fake_clock() -> None:
    now = [0.0]
    durations = iter([0.005, 0.001, 0.003, 0.002, 0.004, 0.006])
    timed = _harness.wall_timer(lambda: now[0])

    def run() -> None:
        now[0] += next(durations)

    cases = [_harness.Case("a", run, lambda out: [], 1, 1)]
    samples = _harness.measure(cases, 6, timed, warmup=0)["a"]
    timing = _harness.Timing.of(samples)
    assert samples == pytest.approx([5, 1, 3, 2, 4, 6])
    assert (timing.median, timing.p20, timing.p80, timing.repeats) == pytest.approx((3.5, 2.0, 5.0, 6))
    assert timing.spread == pytest.approx(3 / 3.5)
    assert _harness.Timing.of([2.0]) == _harness.Timing(2.0, 2.0, 2.0, 1)


def test_rates_count_against_the_copy_of_the_same_run() -> None:
    case = _harness.Case("a", lambda: None, lambda out: [], 3_000_000, 0)
    result = _harness.Result(case, _harness.Timing(1.5, 1.0, 2.0, 5), ceiling=8.0)
    assert (result.gbps, result.fraction) == pytest.approx((2.0, 0.25))
    copy = _harness.ceiling_case(CPU, 1)
    assert copy.bytes == 2 << 20
    assert copy.run().numel() * 4 * 2 == copy.bytes


def test_quick_run_writes_complete_rows_and_appends(no_compiler: None, tmp_path: Path) -> None:
    argv = [*OPS, "--quick", "--threads", "1", "--ceiling-mib", "1", "--device", "cpu", "--dtype", "fp32", "bf16"]
    threads = torch.get_num_threads()
    counts = []
    for _ in range(2):
        assert main([*argv, "--tied", "50", "100", "--output", str(tmp_path)], {"small": small}) == 0
        counts.append({op: len(written(tmp_path / f"{op}.csv")) for op in OPS})
    assert torch.get_num_threads() == threads
    for op in OPS:
        text = (tmp_path / f"{op}.csv").read_text()
        assert text.count("median_ms") == 1
        assert counts[1][op] == 2 * counts[0][op] > 0
        for row in written(tmp_path / f"{op}.csv"):
            assert tuple(row) == _rows.COLUMNS and None not in row.values()
            optional = ("triton", "compiler", "commit")
            assert all(row[name] for name in _rows.COLUMNS if name not in optional)
            assert (row["op"], row["threads"], row["repeats"]) == (op, "1", "5")
            assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
    cases = {row["case"] for row in written(tmp_path / "affine_reconstruct.csv")}
    assert cases == {f"{k}, {p} % tied" for k in ("in place", "forward", "backward") for p in (50, 100)}


def test_every_backend_of_this_machine_takes_part() -> None:
    usable, left_out = _contenders.backends("sma_update_", CPU, torch.float32)
    assert "reference" in usable
    assert {*usable, *(name.removeprefix(_harness.OURS) for name in left_out)} == {"cpp", "reference"}


def test_rows_are_not_appended_to_other_columns(tmp_path: Path) -> None:
    (tmp_path / "sma_update.csv").write_text("op,when\nsma_update,once\n")
    with pytest.raises(_rows.RowsError, match="other columns"):
        _rows.append(tmp_path / "sma_update.csv", [dict.fromkeys(_rows.COLUMNS, "1")])


def test_table_lists_the_fastest_first_and_marks_ours() -> None:
    made = group(**{"lic_fast.cpp": 1.0, "eager": 1.0})
    results = _harness.run_group(made, settings()).results
    text = _rows.table(made, _harness.Outcome(results, {}))
    medians = [result.timing.median for result in results]
    assert medians == sorted(medians)
    assert "* lic_fast.cpp" in text and "* eager" not in text


def test_unknown_op_and_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sma_updat"], {"small": small}) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'sma_updat'" in error and all(op in error for op in OPS)
    assert main(["--repeats", "0"], {"small": small}) == 2
    assert main(["--tied", "101"], {"small": small}) == 2
    assert main(["--device", "mps"], {"small": small}) == 2


def test_list_names_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*OPS, *WHOLE]


def test_every_module_imports_and_every_op_has_groups() -> None:
    names = [module.name for module in pkgutil.iter_modules(lic_fast.benchmarks.__path__)]
    assert {*OPS, "_harness", "parameters", "plot", "__main__"} <= set(names)
    for name in names:
        importlib.import_module(f"lic_fast.benchmarks.{name}")
    for op in OPS:
        assert callable(importlib.import_module(f"lic_fast.benchmarks.{op}").groups)
    for name in WHOLE:
        assert callable(importlib.import_module(f"lic_fast.benchmarks.{name}").comparisons)


def test_missing_compressai_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters._elic.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "compressai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressai", None)
    with pytest.raises(ImportError, match=r'pip install "lic_fast\[compressai\]"'):
        parameters.load("elic2022-official")
    argv = ["--models", "elic2022-official", "--device", "cpu", "--output", str(tmp_path)]
    assert main(argv) == 1
    assert 'pip install "lic_fast[compressai]"' in capsys.readouterr().err


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="elic2022-official"):
        parameters.load("elic")


def test_parameters_are_the_real_ones_and_fresh() -> None:
    pytest.importorskip("compressai")
    first, second = (parameters.load("mbt2018-mean", torch.bfloat16) for _ in range(2))
    assert (len(first), sum(t.numel() for t in first)) == (55, 7_028_003)
    assert {t.dtype for t in first} == {torch.bfloat16}
    assert not any(t.requires_grad for t in first)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))


def test_parameters_without_quantiles() -> None:
    pytest.importorskip("compressai")
    values = parameters.load("mbt2018-mean", quantiles=False)
    assert (len(values), sum(t.numel() for t in values)) == (54, 7_027_619)
    assert len(parameters.load(small, quantiles=False)) == len(small())


def test_plot_draws_the_latest_run_of_each_comparison(no_compiler: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    argv = ["sma_update", "--quick", "--ceiling-mib", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["--plot", "--output", str(tmp_path)]) == 1
    assert main(argv, {"small": small}) == 0
    rows = _rows.read(tmp_path / "sma_update.csv")
    older = [{**row, "utc": "2000-01-01T00:00:00Z"} for row in rows]
    assert plot.panels([*rows, *older]) == [sorted(rows, key=lambda row: float(row["median_ms"]))]
    assert main(["--plot", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "sma_update.png").read_bytes().startswith(b"\x89PNG")

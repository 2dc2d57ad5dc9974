"""The benchmark of whole steps of SOAP: who takes part, in which order, what is counted, what it writes."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
from lic_fast.benchmarks import _rows, _soap_counts, _soap_inputs, _soap_peers, parameters, soap
from lic_fast.benchmarks.__main__ import main
from lic_fast.benchmarks._harness import CEILING, Settings
from torch import Tensor

from lic_fast import explain, use_backend
from lic_fast.optim import SOAP

pytestmark = pytest.mark.usefixtures("small_cache")
CPU = torch.device("cpu")
PLAIN = {"torch.optim.Adam, fused", "torch.optim.Adam, foreach"}
OURS = {"lic_fast.SOAP", "lic_fast.SOAP, stagger"}
MOST_OPS = 150  # of an ordinary step that are not views, whatever the number of tensors


def tiny() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((8, 6, 3, 3), (6, 8, 1, 1), (8,), (9, 5), (1,))]


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_soap_peers.NIKHILVYAS, raising=False)
    for package in ("pytorch_optimizer", "heavyball"):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)


def run(tmp_path: Path, *options: str) -> list[dict[str, str]]:
    argv = ["soap", "--quick", "--threads", "1", "--ceiling-mib", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert main([*argv, *options], {"tiny": tiny}) == 0
    with (tmp_path / "soap.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_quick_run_writes_rows_that_plot(no_peers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path)
    assert {row["backend"] for row in rows} == {CEILING, *OURS, *PLAIN}
    for row in rows:
        assert tuple(row) == _rows.columns_of(tmp_path / "soap.csv") and None not in row.values()
        assert (row["op"], row["dtype"], row["threads"], row["repeats"]) == ("soap", "fp32", "1", "10")
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
    by_name = {row["backend"]: row for row in rows}
    ours, adam = by_name["lic_fast.SOAP"], by_name["torch.optim.Adam, fused"]
    assert (ours["refreshes"], adam["refreshes"], adam["refresh_ms"]) == ("1", "0", "")
    assert int(by_name["lic_fast.SOAP, stagger"]["refreshes"]) > 1
    assert float(ours["refresh_ms"]) <= float(ours["slowest_ms"])
    assert int(ours["refresh_ops"]) > int(ours["ops"]) > 0
    assert "soap_update_: " in ours["chosen"] and not adam["chosen"]
    printed = capsys.readouterr().out
    assert "left out: nikhilvyas/SOAP: not on PyPI; set LIC_FAST_NIKHILVYAS_SOAP" in printed
    assert "left out: pytorch_optimizer.SOAP: not installed; run: pip install pytorch_optimizer" in printed
    pytest.importorskip("matplotlib")
    assert main(["soap", "--plot", "--output", str(tmp_path)]) == 0


def test_repeats_are_rounded_up_to_whole_periods(no_peers: None, tmp_path: Path) -> None:
    ours = {row["backend"]: row for row in run(tmp_path, "--repeats", "11")}["lic_fast.SOAP"]
    assert (ours["repeats"], ours["refreshes"]) == ("20", "2")


def test_peers_take_part_where_they_are_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(_soap_peers.NIKHILVYAS, raising=False)
    pytest.importorskip("pytorch_optimizer")
    theirs = {row["backend"]: row for row in run(tmp_path)}["pytorch_optimizer.SOAP"]
    assert theirs["refreshes"] == "1" and int(theirs["refresh_ops"]) > int(theirs["ops"])


def test_a_file_that_is_no_optimizer_is_left_out(
    no_peers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "soap.py"
    monkeypatch.setenv(_soap_peers.NIKHILVYAS, str(path))
    assert "names no file" in _soap_peers.contenders(CPU)[1]["nikhilvyas/SOAP"]
    path.write_text("x = 1\n")
    assert "AttributeError" in _soap_peers.contenders(CPU)[1]["nikhilvyas/SOAP"]


def test_wrong_updates_are_refused(
    no_peers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(SOAP):
        def step(self, closure=None):
            super().step(closure)
            if self.param_groups[0]["params"][0].dtype is torch.float32:  # the specification runs in fp64
                for p in self.param_groups[0]["params"]:
                    p.data += 1e-7

    wrong = _soap_peers.Contender("lic_fast.wrong", _soap_peers._soap(Wrong))
    monkeypatch.setattr(_soap_peers, "_ours", lambda: [wrong])
    argv = ["soap", "--quick", "--ceiling-mib", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert main(argv, {"tiny": tiny}) == 1
    assert "REFUSED: lic_fast.wrong: its first 12 updates are off by" in capsys.readouterr().out


def test_a_peer_that_fails_on_the_way_is_out_and_named(no_peers: None) -> None:
    class Fragile(torch.optim.SGD):
        def step(self, closure=None):
            if any(p.numel() > 100 for p in self.param_groups[0]["params"]):
                raise RuntimeError("too large")

    fragile = _soap_peers.Contender("fragile", lambda params: Fragile(params, lr=0.1))
    entered = [*_soap_peers.contenders(CPU)[0], fragile]
    result = soap.race(entered, tiny(), 10, Settings({}, ceiling_mib=1))
    assert result.failed == {"fragile": "its step 1 fails, RuntimeError: too large"}
    assert {racer.contender.name for racer in result.racers} == OURS | PLAIN


def test_racers_take_turns_on_equal_gradients(no_peers: None) -> None:
    seen: list[tuple[str, float]] = []

    def spy(name: str) -> _soap_peers.Contender:
        class Spy(torch.optim.SGD):
            def step(self, closure=None):
                grad = self.param_groups[0]["params"][0].grad
                seen.append((name, float(grad.sum())))
                grad.zero_()  # as some do

        return _soap_peers.Contender(name, lambda params: Spy(params, lr=0.1), False)

    soap.race([spy("a"), spy("b")], tiny(), 10, Settings({}, ceiling_mib=1))
    assert [name for name, _ in seen] == ["a", "b"] * (soap.WARMUP + 10)
    sums = [value for _, value in seen]
    assert sums[::2] == sums[1::2] and len(set(sums)) == len(sums) // 2


def test_ops_are_counted_without_views() -> None:
    x = torch.zeros(4, 4)
    assert _soap_counts.count_ops(lambda: x.view(16)[3:].add_(1)) == 1
    assert _soap_counts.count_ops(lambda: x.reshape(2, 8).T.unbind()) == 0
    assert _soap_counts.count_ops(lambda: (x @ x).sin().cos()) == 3


def test_an_op_of_ours_counts_with_what_it_dispatches() -> None:
    params = [torch.nn.Parameter(p) for p in tiny()]
    optimizer = SOAP(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    with use_backend("reference"):
        counted = _soap_counts.count_ops(optimizer.step)
    assert counted > 10 * len(params)  # the reference goes tensor by tensor


def test_state_bytes_are_those_of_unique_storages() -> None:
    shared = torch.zeros(10)
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"a": shared[:5], "b": [shared[5:], p.detach()], "c": {"d": torch.zeros(2)}}
    assert _soap_counts.state_bytes(optimizer) == 48


def test_calls_of_qr_are_counted_and_the_function_is_put_back() -> None:
    original = torch.linalg.qr
    with _soap_counts.counted_qr() as calls:
        torch.linalg.qr(torch.eye(3))
        assert calls() == 1
    assert torch.linalg.qr is original


def test_work_of_a_convolution() -> None:
    shapes = [(4, 3, 5, 5), (4,), (7, 1)]
    n = [300, 4, 7]
    axes = [(4, 3, 5, 5), (), (7,)]
    assert _soap_inputs.step_flops(shapes) == sum(
        20 * k + sum(5 * k * d for d in a) for k, a in zip(n, axes, strict=True)
    )
    assert _soap_inputs.refresh_flops(shapes) == sum(
        14 * d**3 + 2 * k * d for k, a in zip(n, axes, strict=True) for d in a
    )


def test_products_batched_by_shape_are_those_of_the_specification() -> None:
    from lic_fast.reference.soap_update import project

    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    bases = [torch.randn(2, d, d, dtype=torch.float64) if d else None for d in (3, 0, 5)]
    for back in (False, True):
        expected = [
            project(x[i], [torch.empty(0, 0) if b is None else b[i] for b in bases], back=back) for i in range(2)
        ]
        torch.testing.assert_close(_soap_inputs.turned(x, bases, back=back), torch.stack(expected))


def test_factors_are_full_rank_and_their_bases_orthonormal() -> None:
    GG, Q = _soap_inputs.factors(24, 3)
    assert not torch.equal(GG[0], GG[1])
    values = torch.linalg.eigvalsh(GG.double())
    assert 1e5 < float(values[0, -1] / values[0, 0]) < 1e8
    torch.testing.assert_close(Q.mT @ Q, torch.eye(24).expand(3, 24, 24), atol=1e-5, rtol=0)
    rotated = Q.mT @ GG @ Q
    kept = rotated.diagonal(dim1=1, dim2=2).square().sum() / rotated.square().sum()
    assert 0.9 < float(kept) < 1  # the basis of ten steps before: close, and not the eigenvectors


def test_an_ordinary_step_of_elic_dispatches_few_ops() -> None:
    pytest.importorskip("compressai")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = explain("soap_update_", device).chosen
    if chosen not in ("cpp", "triton"):
        pytest.skip(f"soap_update_ runs in {chosen} here, which goes tensor by tensor; build lic_fast for its kernels")
    values = parameters.load("elic2022-official", device=device, quantiles=False)
    params = [torch.nn.Parameter(v) for v in values]
    optimizer = SOAP(params, lr=1e-4)
    for _ in range(2):
        for p in params:
            p.grad = 1e-3 * torch.randn_like(p)
        optimizer.step()
    ops = _soap_counts.count_ops(optimizer.step)
    assert ops <= MOST_OPS, f"{ops} ops for {len(params)} tensors"
    assert math.isfinite(float(params[0].sum()))

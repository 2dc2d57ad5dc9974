"""Shared by all tests: NaN-poisoned allocations inside the package, the usable backends, the tolerance rule."""

from __future__ import annotations

import sys

import pytest
import torch

import lic_fast
from lic_fast import _dispatch

torch.set_num_threads(2)

_REAL = {name: getattr(torch, name) for name in ("empty", "empty_like")}


def _poisoning(real):
    def allocate(*args, **kwargs):
        tensor = real(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("lic_fast.") and type(tensor) is torch.Tensor and not torch.compiler.is_compiling():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype is not torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package allocates without writing shows up as NaN."""
    for name, real in _REAL.items():
        monkeypatch.setattr(torch, name, _poisoning(real))


@pytest.fixture(autouse=True)
def automatic_backend(monkeypatch: pytest.MonkeyPatch):
    """Every test starts in auto mode, and what it sets ends with it."""
    monkeypatch.delenv("LIC_FAST_BACKEND", raising=False)
    yield
    assert not _dispatch._blocks
    _dispatch._setting = None


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """For benchmarks of tiny cases: emptying the real last-level cache before every run would take longer than they."""
    from lic_fast.benchmarks import _harness

    monkeypatch.setattr(_harness, "_last_level_cache", lambda device: 1 << 20)


def devices() -> list[str]:
    """The devices at hand."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def usable(op: str) -> list[tuple[str, str]]:
    """(device, backend) pairs that can run `op` here, the reference included."""
    pairs = [(device, lic_fast.explain(op, device)) for device in devices()]
    return [(device, name) for device, told in pairs for name, reason in told.reasons.items() if reason is None]


def backend_parameters(op: str) -> pytest.MarkDecorator:
    """Parametrizes a test over usable(op)."""
    pairs = usable(op)
    return pytest.mark.parametrize(("device", "backend"), pairs, ids=[f"{d}-{b}" for d, b in pairs])


def assert_by_rule(ours: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, factor: float = 2.0) -> None:
    """The one tolerance rule: err(ours, fp64) <= factor * err(same-dtype PyTorch, fp64) + tiny."""
    assert ours.shape == exact.shape
    assert not torch.isnan(ours).any()
    scale = exact.abs().max().item() if exact.numel() else 0.0
    ulps = 64 if ours.dtype is torch.float64 else 4  # nothing is wider than fp64: "exact" has rounding of its own
    tiny = ulps * torch.finfo(ours.dtype).eps * scale + torch.finfo(ours.dtype).tiny
    error = (ours.double() - exact).abs().max().item() if exact.numel() else 0.0
    allowed = (same_dtype.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= factor * allowed + tiny, f"error {error:.3e}, same-dtype PyTorch {allowed:.3e}, scale {scale:.3e}"

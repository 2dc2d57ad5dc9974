"""Which implementation of an op runs: the table of backends, the choice, and the explanation of every refusal."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

logger = logging.getLogger("lic_fast")

BACKENDS = ("cuda", "triton", "cpp", "reference")
ENVIRONMENT_VARIABLE = "LIC_FAST_BACKEND"


class BackendError(RuntimeError):
    """A backend that was asked for by name does not exist or cannot run here; it never falls back to another."""


@dataclass(frozen=True)
class Impl:
    """One implementation of an op.

    function: takes the op's arguments. devices: device types it runs on. dtypes: of the op's first tensor.
    why_not: given a device type, the reason it cannot run on this machine, or None where it can.
    """

    function: Callable[..., Any]
    devices: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[str], str | None] = lambda device: None


@dataclass
class OpSpec:
    """An op's implementations by backend, and for each device type the order in which auto mode tries them."""

    name: str
    impls: dict[str, Impl]
    order: dict[str, tuple[str, ...]]
    _choices: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)

    def why_not(self, backend: str, device: str, dtype: torch.dtype) -> str | None:
        """The reason `backend` cannot run this op on `device` with `dtype`, or None where it can."""
        impl = self.impls.get(backend)
        if impl is None:
            return f"{self.name} has no {backend} implementation"
        if impl.devices is not None and device not in impl.devices:
            return f"{self.name} in {backend} runs on {' and '.join(impl.devices)}, not on {device}"
        if dtype not in impl.dtypes:
            return f"{self.name} in {backend} does not take {dtype}"
        return impl.why_not(device)

    @property
    def usual_dtype(self) -> torch.dtype:
        """fp32 where the op takes it, else the first dtype it takes."""
        dtypes = self.impls["reference"].dtypes
        return torch.float32 if torch.float32 in dtypes else dtypes[0]

    def candidates(self, device: str) -> tuple[str, ...]:
        """The backends auto mode tries on `device`, measured fastest first."""
        return self.order.get(device, ("reference",))

    def choose(self, device: str, dtype: torch.dtype) -> str:
        """The backend that runs this op on `device` with `dtype`; raises BackendError where none can."""
        forced = asked_for()
        if forced is not None:
            reason = self.why_not(forced, device, dtype)
            if reason is not None:
                raise BackendError(f"{self.name}: backend {forced!r} was asked for and cannot run: {reason}")
            return forced
        key = (device, dtype)
        if key not in self._choices:
            usable = [b for b in self.candidates(device) if self.why_not(b, device, dtype) is None]
            if not usable:
                reason = self.why_not("reference", device, dtype)
                raise BackendError(f"{self.name}: no backend runs on {device} with {dtype}: {reason}")
            self._choices[key] = usable[0]
            logger.info("%s on %s with %s runs in %s", self.name, device, dtype, usable[0])
        return self._choices[key]

    def __call__(self, tensor: torch.Tensor, *args: Any) -> Any:
        """Runs the op; `tensor` (one of its inputs) decides device and dtype."""
        return self.impls[self.choose(tensor.device.type, tensor.dtype)].function(*args)


OPS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Adds `spec` to the table that explain() reads."""
    OPS[spec.name] = spec
    return spec


_lock = threading.Lock()
_setting: use_backend | None = None  # the last use_backend(...) that is no block
_blocks: list[use_backend] = []  # the open ones, in the order of their opening
_order = itertools.count()


def _checked(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise BackendError(f"{source}: unknown backend, got {name!r}; use auto, {', '.join(BACKENDS)}")
    return name


def asked_for() -> str | None:
    """The backend that was asked for by name, or None where the order decides."""
    with _lock:
        latest = max([*_blocks, *([_setting] if _setting else [])], key=lambda use: use.order, default=None)
    if latest is not None:
        return None if latest.name == "auto" else latest.name
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE)


def before_falling_back(op: str, reason: str) -> None:
    """Called where an implementation cannot take these very arguments: BackendError if it was asked for by name."""
    forced = asked_for()
    if forced is not None:
        raise BackendError(f"{op}: backend {forced!r} was asked for and cannot run: {reason}")


class use_backend:
    """Makes every op run in backend `name`: from now on, or for a `with` block.

    name: "cuda", "triton", "cpp", "reference", or "auto" for the measured order. The choice holds for the whole
    process (backward passes run on other threads), the latest one wins, and all win over the environment variable
    LIC_FAST_BACKEND.
    Raises BackendError for an unknown name here, and for a backend that cannot run at the op's call: a forced
    backend never falls back.
    """

    def __init__(self, name: str) -> None:
        global _setting
        _checked(name, "use_backend")
        self.name, self.order = name or "auto", next(_order)
        with _lock:
            self._before, _setting = _setting, self

    def __enter__(self) -> use_backend:
        global _setting
        with _lock:
            if _setting is self:
                _setting = self._before
            _blocks.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            _blocks.remove(self)


@dataclass(frozen=True)
class Explanation:
    """What explain() answers: the backend that runs, and for each backend None or the reason it does not."""

    op: str
    device: str
    dtype: torch.dtype
    chosen: str | None
    forced: bool
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        how = "asked for by name" if self.forced else "first usable, fastest first"
        head = f"{self.op} on {self.device} with {self.dtype}: {self.chosen or 'nothing can run'} ({how})"
        return "\n".join([head, *(f"  {name}: {reason or 'usable'}" for name, reason in self.reasons.items())])


def explain(op: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Explanation:
    """Says which backend runs `op` on `device` with `dtype`, and why the others do not.

    device: default "cuda" where available, else "cpu". dtype: default fp32, or what the op takes where that is not fp32
    (the coders' int32). Print the result for a table. Raises ValueError for an unknown op.
    """
    spec = OPS.get(op)
    if spec is None:
        raise ValueError(f"explain: unknown op, got {op!r}; use one of {', '.join(sorted(OPS))}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, dtype = torch.device(device).type, dtype or spec.usual_dtype
    tried: Sequence[str] = [*spec.candidates(kind), *(b for b in BACKENDS if b not in spec.candidates(kind))]
    reasons = {backend: spec.why_not(backend, kind, dtype) for backend in tried}
    forced = asked_for()
    if forced is not None:
        chosen = forced if reasons[forced] is None else None
    else:
        chosen = next((b for b in spec.candidates(kind) if reasons[b] is None), None)
    return Explanation(op, kind, dtype, chosen, forced is not None, reasons)

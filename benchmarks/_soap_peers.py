"""Who races in the benchmark of whole optimizer steps, and whether lic_fast's first updates are right."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import use_backend
from ..optim import SOAP
from ._harness import OURS

NIKHILVYAS = "LIC_FAST_NIKHILVYAS_SOAP"
FREQUENCY = 10
LR = 1e-4
NOISE = 1e-3
# What another's optimizer may raise for a model, a version of torch or a machine that it does not know.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

_BETAS = (0.95, 0.95)
_SHAPES = ((8, 6, 3, 3), (6, 8, 5, 5), (4, 5, 3, 3), (12, 12, 2), (7,))  # of full rank, all factors of them
_UPDATES = 12  # one of them follows a refresh
_CLOSE = 2e-4  # relative, in fp32: nikhilvyas/SOAP, pytorch_optimizer and ours are within 1.2e-5 of fp64

Build = Callable[[Sequence[Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer that takes part. preconditioned: whether it is a SOAP, with factors and refreshes."""

    name: str
    build: Build
    preconditioned: bool = True

    @property
    def ours(self) -> bool:
        """Whether it is lic_fast's."""
        return self.name.startswith(OURS)


def _soap(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Build:
    settings = {"lr": LR, "betas": _BETAS, "weight_decay": 0.01, "precondition_frequency": FREQUENCY, **options}
    return lambda params: kind(params, **settings)


def _ours() -> list[Contender]:
    return [
        Contender(f"{OURS}SOAP", _soap(SOAP)),
        Contender(f"{OURS}SOAP, stagger", _soap(SOAP, stagger=True)),
    ]


def _adams() -> list[Contender]:
    def adam(**options: bool) -> Build:
        return lambda params: torch.optim.Adam(params, lr=LR, betas=_BETAS, **options)

    return [
        Contender("torch.optim.Adam, fused", adam(fused=True), False),
        Contender("torch.optim.Adam, foreach", adam(foreach=True), False),
    ]


def _nikhilvyas() -> Build:
    """The class of the authors' soap.py, which is no package."""
    path = os.environ.get(NIKHILVYAS)
    if not path:
        raise ImportError(f"not on PyPI; set {NIKHILVYAS} to the soap.py of github.com/nikhilvyas/SOAP")
    if not Path(path).is_file():
        raise ImportError(f"{NIKHILVYAS} names no file, got {path!r}")
    spec = importlib.util.spec_from_file_location("lic_fast_nikhilvyas_soap", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{NIKHILVYAS} must name a file ending in .py, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _soap(module.SOAP)


def _optional(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f"not installed; run: pip install {package}") from None


def _pytorch_optimizer() -> Build:
    return _soap(_optional("pytorch_optimizer").SOAP)


def _heavyball() -> Build:
    """In eager and without merging, as the others; shampoo_beta and max_precond_dim as the others' defaults."""
    heavyball = _optional("heavyball")
    importlib.import_module("heavyball.utils").compile_mode = None
    return _soap(heavyball.SOAP, shampoo_beta=_BETAS[1], max_precond_dim=10000, merge_dims=False)


_PEERS = {
    "nikhilvyas/SOAP": _nikhilvyas,
    "pytorch_optimizer.SOAP": _pytorch_optimizer,
    "heavyball.SOAP, eager": _heavyball,
}
_SAME_STEPS = ("nikhilvyas/SOAP", "pytorch_optimizer.SOAP")  # HeavyBall lifts and debiases: its steps are others


def contenders(device: torch.device) -> tuple[list[Contender], dict[str, str], dict[str, str]]:
    """(who takes part, who does not and why, which of lic_fast's is refused and why)."""
    peers, left_out = [], {}
    for name, load in _PEERS.items():
        try:
            peer = Contender(name, load())
            first_updates(peer.build, device)
        except FAILURES as error:
            left_out[name] = reason(error)
        else:
            peers.append(peer)
    ours, refused = [], {}
    for contender in _ours():
        complaint = _complaint(contender, peers, device)
        if complaint is None:
            ours.append(contender)
        else:
            refused[contender.name] = complaint
    return [*ours, *_adams(), *peers], left_out, refused


def reason(error: BaseException) -> str:
    """An error in one line of moderate length."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError) else f"{type(error).__name__}: {text[:200]}"


def first_updates(build: Build, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What the first updates add to small parameters, whose own rounding then does not hide it, in fp64.

    Every factor has full rank after one gradient: the eigenvectors of others hang on the last bits of rounding.
    """
    generator = torch.Generator().manual_seed(3)

    def noise(shape: Sequence[int]) -> Tensor:
        return (NOISE * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    params = [Parameter(noise(shape)) for shape in _SHAPES]
    optimizer = build(params)
    updates = []
    for step in range(_UPDATES + 1):
        for p in params:
            p.grad = noise(p.shape)
        before = [p.detach().double().clone() for p in params]
        optimizer.step()
        if step:  # the first step moves nothing
            updates += [p.detach().double() - b for p, b in zip(params, before, strict=True)]
    return updates


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative difference of an update of a tensor, by norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def _complaint(contender: Contender, peers: Sequence[Contender], device: torch.device) -> str | None:
    """Where its first updates part from the specification in fp64 and from the peers with the same steps."""
    updates = first_updates(contender.build, device)
    with use_backend("reference"):
        found = {"the specification in fp64": first_updates(contender.build, device, torch.float64)}
    if "stagger" not in contender.name:
        found |= {peer.name: first_updates(peer.build, device) for peer in peers if peer.name in _SAME_STEPS}
    for name, theirs in found.items():
        off = distance(updates, theirs)
        if not off <= _CLOSE:
            return (
                f"its first {_UPDATES} updates are off by {off:.3g} from {name}, more than the {_CLOSE:g} let through"
            )
    return None

"""accelerate(model): CompressAI's modules in a model become lic_fast's, in place; restore(model) undoes it.

Only an instance's class changes: parameters, buffers, hooks, and whoever holds a reference to the module (optimizers,
DistributedDataParallel, another module) see the same objects as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain

import torch
from torch import nn

from ._dispatch import explain

_SERIAL_OPS = ("ans_coder_encode", "ans_coder_decode_", "context_conv")  # CompressAI's code runs before the reference
_WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile


Replacement = Callable[[type], "type | str | None"]


@dataclass(frozen=True)
class Kind:
    """A family of modules that accelerate() swaps, and `only` names.

    replacement: from a class, the class that takes its place; None where it is not of this family; a string that says
    why an instance of the family stays as it is. ops: those that run in the swapped modules.
    """

    replacement: Replacement
    ops: tuple[str, ...]


def one_class(theirs: str, ours: str) -> Replacement:
    """The replacement of a single class of CompressAI, exactly; both are "module:name", imported when asked."""

    def replacement(kind: type) -> type | str | None:
        stock, own = _named(theirs), _named(ours)
        if kind is stock:
            return own
        if issubclass(kind, own):
            return "it is lic_fast's already"
        return f"it is a subclass of {stock.__name__}, whose methods would be lost" if issubclass(kind, stock) else None

    return replacement


def first(*replacements: Replacement) -> Replacement:
    """The first answer that is not None."""
    return lambda kind: next((answer for find in replacements if (answer := find(kind)) is not None), None)


def _named(path: str) -> type:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def _variable_rate(kind: type) -> str | None:
    stock = _named("compressai.entropy_models:EntropyModelVbr")
    return "it quantises with a variable step, which no fused op does" if issubclass(kind, stock) else None


def _autoregressive(kind: type) -> type | str | None:
    """Models and latent codecs that code pixel by pixel; their subclasses too, unless they override the loops."""
    bases = (
        _named("compressai.models.google:JointAutoregressiveHierarchicalPriors"),
        _named("compressai.latent_codecs:RasterScanLatentCodec"),
    )
    if not issubclass(kind, bases):
        return None
    autoregressive = import_module("lic_fast.entropy.autoregressive")
    reason = autoregressive.why_not(kind)
    return autoregressive.accelerated(kind) if reason is None else reason


_MODELS = "compressai.entropy_models"
# The first kind that answers decides: a subclass comes before what it derives from.
KINDS: dict[str, Kind] = {
    "gaussian_mixture_conditional": Kind(
        one_class(f"{_MODELS}:GaussianMixtureConditional", "lic_fast.entropy:GaussianMixtureConditional"),
        ("mixture_rate",),
    ),
    "gaussian_conditional": Kind(
        one_class(f"{_MODELS}:GaussianConditional", "lic_fast.entropy:GaussianConditional"),
        ("mixture_rate", "ans_coder_encode"),
    ),
    "entropy_bottleneck": Kind(
        first(one_class(f"{_MODELS}:EntropyBottleneck", "lic_fast.entropy:EntropyBottleneck"), _variable_rate),
        ("factorized_rate", "ans_coder_encode"),
    ),
    "gdn": Kind(
        first(
            one_class("compressai.layers:GDN1", "lic_fast.entropy:GDN1"),
            one_class("compressai.layers:GDN", "lic_fast.entropy:GDN"),
        ),
        ("gdn",),
    ),
    "autoregressive": Kind(_autoregressive, ("context_conv", "ans_coder_decode_")),
}


@dataclass(frozen=True)
class Entry:
    """One module of a model: its path ("" for the model), its class (before), and why it was kept, or ""."""

    path: str
    kind: str
    reason: str = ""


@dataclass
class Report:
    """What accelerate() or restore() did; print it.

    swapped: the modules whose class was changed. kept: those of CompressAI's entropy models and GDNs that stay as they
    are, and why. backends: for each op that runs in the swapped modules, device and dtype, the backend.
    """

    swapped: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    backends: dict[tuple[str, str, torch.dtype], str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped" + (":" if self.swapped else ", there was nothing to swap")]
        for kind in dict.fromkeys(entry.kind for entry in self.swapped):
            paths = [entry.path or "the model itself" for entry in self.swapped if entry.kind == kind]
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            lines.append(f"  {kind} x {len(paths)}: {', '.join(paths[:3])}{more}")
        lines += [f"  kept {entry.path or 'the model itself'} ({entry.kind}): {entry.reason}" for entry in self.kept]
        lines += [f"  {op} on {device}, {dtype}: {name}" for (op, device, dtype), name in self.backends.items()]
        return "\n".join(lines)


def _modules(model: nn.Module, function: str) -> list[tuple[str, nn.Module]]:
    """Every module of the model once, under its path inside of the wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    inner, prefix = model, ""
    while len(children := dict(inner.named_children())) == 1 and (name := next(iter(children))) in _WRAPPERS:
        inner, prefix = children[name], f"{prefix}{name}."
    return [(name.removeprefix(prefix), module) for name, module in model.named_modules()]


def _chosen(only: Iterable[str] | None) -> dict[str, Kind]:
    if only is None:
        return KINDS
    names = [only] if isinstance(only, str) else list(only)
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ValueError(f"accelerate: only must name some of {', '.join(KINDS)}, got {', '.join(map(repr, unknown))}")
    return {name: KINDS[name] for name in KINDS if name in names}


def _backend(op: str, device: torch.device, dtype: torch.dtype) -> str:
    from .entropy._coder import prefers_stock

    if device.type == "cpu" and op in _SERIAL_OPS and prefers_stock(op, dtype):
        return "CompressAI's own, lic_fast's C++ library is not built"
    return explain(op, device, dtype).chosen or "nothing can run"


def accelerate(model: nn.Module, *, only: Iterable[str] | None = None, verbose: bool = True) -> Report:
    """Makes the modules of CompressAI in `model` lic_fast's, in place; returns what was swapped and what was not.

    model: any torch.nn.Module, also inside of DistributedDataParallel or torch.compile, before or after these; it may
    itself be what is swapped. Swapped are instances of exactly GaussianConditional, GaussianMixtureConditional,
    EntropyBottleneck, GDN and GDN1, and models and latent codecs that code pixel by pixel. A model without any gives an
    empty report; a second call swaps nothing more. only: the names of KINDS to swap, default all. verbose: print the
    report.

    state_dict, load_state_dict, deepcopy, pickle, to(), half(), update() and aux_loss() work as before. A model saved
    whole (torch.save(model)) needs lic_fast where it is loaded; restore() it before, or save its state_dict.
    Likelihoods are CompressAI's; noise is drawn otherwise, unless a module's attribute `noise` is "torch". All kinds
    but "gdn" code to the same bytes and decode to the same values, to the bit. GDN's sums round otherwise, in each
    backend in its own way: leave it out by `only` where pixels must be exact. See the classes in lic_fast.entropy for
    what else differs, and for their settings.

    Raises TypeError for what is not a module, ValueError for unknown names in only, ImportError without CompressAI.
    Source: our choice.
    """
    modules, kinds = _modules(model, "accelerate"), _chosen(only)
    _import_compressai()
    report = Report()
    for path, module in modules:
        for kind in kinds.values():
            stock = type(module)
            ours = kind.replacement(stock)
            if isinstance(ours, type):
                module.__class__ = ours
                getattr(module, "_lic_fast_accelerated", _nothing)()
                report.swapped.append(Entry(path, stock.__name__))
                _explain(report, module, model, kind)
                break
            if ours is not None:
                report.kept.append(Entry(path, stock.__name__, ours))
                break
    if verbose:
        print(f"lic_fast.accelerate: {report}")
    return report


def restore(model: nn.Module) -> Report:
    """Gives every module in `model` that is lic_fast's the class of CompressAI that it stands for; in place.

    That undoes accelerate(), and works for modules that were built as lic_fast's, but not for subclasses of those.
    Tables stay as they are, and CompressAI codes with stale ones: after training call update(force=True).

    Raises TypeError for what is not a module. Source: our choice.
    """
    report = Report()
    for path, module in _modules(model, "restore"):
        ours = type(module)
        stock = _stock(ours)
        if stock is not None:
            getattr(module, "_lic_fast_restored", _nothing)()
            module.__class__ = stock
            report.swapped.append(Entry(path, ours.__name__))
    return report


def _nothing() -> None:
    pass


def _stock(kind: type) -> type | None:
    """CompressAI's class that a class of ours stands for, or None where it is not ours."""
    if "_lic_fast_stock" in vars(kind):
        return vars(kind)["_lic_fast_stock"]
    if not kind.__module__.startswith("lic_fast."):
        return None
    return next((base for base in kind.__mro__ if base.__module__.startswith("compressai.")), None)


def _explain(report: Report, module: nn.Module, model: nn.Module, kind: Kind) -> None:
    tensors = chain(module.parameters(), model.parameters(), module.buffers())  # the tables among these are int32
    tensor = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    for op in kind.ops:
        coder = op.startswith("ans_coder")
        device, dtype = (torch.device("cpu"), torch.int32) if coder else (tensor.device, tensor.dtype)
        report.backends.setdefault((op, device.type, dtype), _backend(op, device, dtype))


def _import_compressai() -> None:
    """ImportError, naming the extra, where CompressAI is missing."""
    try:
        import_module("compressai")
    except ModuleNotFoundError as error:
        if error.name != "compressai":
            raise
        raise ImportError("accelerate: CompressAI is not installed; run: pip install lic_fast[compressai]") from error

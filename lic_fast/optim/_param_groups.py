"""Which parameters of a model SOAP preconditions, which it decays, and which it leaves to plain Adam."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

_BOTTLENECKS = frozenset({"EntropyBottleneck"})
_GDN = frozenset({"GDN", "GDN1"})


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of a model of learned image compression as groups for lic_fast.optim.SOAP.

    model: any torch.nn.Module, parameters of any shape. Returns at most three dictionaries, empty ones left out:

    1. weights, of 2 or more axes: preconditioned, with the optimizer's own weight decay;
    2. biases (by name), parameters of fewer than 2 axes, and those of norm layers (a class whose name, or that of a
       class it derives from, contains "Norm") and of GDN and GDN1: weight_decay=0;
    3. all parameters inside an EntropyBottleneck: plain Adam (precondition=False), weight_decay=0. Its tiny matrices,
       one [r, c] for each channel, are no linear maps between the axes that SOAP would rotate.

    Parameters called `quantiles` are left out: the auxiliary loss trains them, with an optimizer of its own. Shared
    parameters are listed once, where they come first; frozen ones are included, as in model.parameters(). Classes are
    recognised by name, so CompressAI is not needed. Other optimizers take the groups too and ignore `precondition`.

    Raises TypeError where model is no module, ValueError for lazy parameters that have no shape yet.
    Source: leaving biases and normalization out of weight decay is common practice, leaving out the quantiles is
    CompressAI's net_aux_optimizer; keeping entropy bottlenecks on Adam is our choice.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: model must be a torch.nn.Module, got {type(model).__name__}; pass the model")
    kinds: tuple[list[nn.Parameter], ...] = ([], [], [])
    seen: set[nn.Parameter] = set()
    for module, name, parameter, inside in _walk(model, False, set()):
        if parameter in seen or name == "quantiles":
            continue
        if is_lazy(parameter):
            raise ValueError(
                f"param_groups: a parameter {name!r} of {type(module).__name__} has no shape yet; run the model once"
            )
        seen.add(parameter)
        kinds[2 if inside else int(_undecayed(module, name, parameter))].append(parameter)
    extra = ({}, {"weight_decay": 0.0}, {"weight_decay": 0.0, "precondition": False})
    return [{"params": params, **more} for params, more in zip(kinds, extra, strict=True) if params]


def _walk(
    module: nn.Module, inside: bool, visited: set[nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Parameter, bool]]:
    """(its module, its name there, the parameter, whether inside an entropy bottleneck), as named_parameters orders."""
    if module in visited:
        return
    visited.add(module)
    inside = inside or bool(_BOTTLENECKS & _class_names(module))
    for name, parameter in module.named_parameters(recurse=False):
        yield module, name, parameter, inside
    for child in module.children():
        yield from _walk(child, inside, visited)


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _undecayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    names = _class_names(module)
    return (
        parameter.dim() < 2
        or "bias" in name.split("_")  # bias, in_proj_bias, relative_position_bias_table
        or bool(_GDN & names)
        or any("Norm" in known for known in names)
    )

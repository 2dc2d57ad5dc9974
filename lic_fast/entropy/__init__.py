"""Drop-ins for CompressAI's modules, and a model of our own; imported at first use, compressai being optional."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the submodule that defines it
_SUBMODULES = {
    "EntropyBottleneck": "entropy_bottleneck",
    "GDN": "gdn",
    "GDN1": "gdn",
    "GaussianConditional": "gaussian_conditional",
    "GaussianMixtureConditional": "gaussian_mixture",
    "MSPEntropyModel": "msp",
    "PROFILES": "msp",
    "Profile": "msp",
    "Schedule": "_schedule",
    "is_portable": "_msp_stream",
    "replace_context_model": "..codec.replace",  # what it returns is a codec: it lives there, and is named here too
    "solve_quantiles": "entropy_bottleneck",
}
__all__ = [*_SUBMODULES]


def __getattr__(name: str) -> Any:
    """The public name `name`; ImportError where compressai is missing."""
    if name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        path = _SUBMODULES[name]
        module = importlib.import_module(path if path.startswith(".") else f".{path}", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "compressai":
            raise
        raise ImportError(
            f"lic_fast.entropy.{name}: CompressAI is not installed; run: pip install lic_fast[compressai]"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])

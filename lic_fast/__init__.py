"""lic_fast: custom-kernel performance extension for learned image compression.

Importing touches no GPU, compiles nothing and needs neither Triton nor the native libraries.
"""

from __future__ import annotations

import os as _os

# In a source checkout the Triton kernels and the benchmarks lie beside this package; installed, inside it.
_checkout = _os.path.dirname(__path__[0])
if _os.path.isfile(_os.path.join(_checkout, "csrc", "bind.cpp")):
    __path__.append(_checkout)

from . import functional, optim  # noqa: E402
from ._dispatch import BackendError, Explanation, explain, use_backend  # noqa: E402
from .patch import accelerate, restore  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Explanation",
    "__version__",
    "accelerate",
    "explain",
    "functional",
    "optim",
    "restore",
    "use_backend",
]

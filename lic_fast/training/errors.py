"""The error a user of train, evaluate, compress or decompress can cause, and the optional imports."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

_EXTRAS = {"bjontegaard": "compare", "imagecodecs": "compare"}  # of what is not in the extra train
_PACKAGES = {"PIL": "pillow", "skimage": "scikit-image", "pytorch_msssim": "pytorch-msssim"}


class TrainingError(RuntimeError):
    """An anticipated failure, told in one line: what is wrong, what was got, what to do."""


def optional_import(name: str) -> ModuleType:
    """The module `name` of the training extra, or of another one.

    Raises ImportError, naming the extra, where it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # CompressAI scripts two helpers at import; torch answers with a deprecation no user can act on.
            warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        package, extra = _PACKAGES.get(top, top), _EXTRAS.get(top, "train")
        raise ImportError(
            f'{package} is not installed, and this command needs it; run: pip install "lic_fast[{extra}]"'
        ) from None

"""checkpoint.pt: everything a run needs to go on as if it had never stopped.

A dictionary of tensors, numbers, strings, lists and dictionaries; torch.load(weights_only=True) reads it:

    kind, format        "lic_fast.checkpoint", 1
    config              TrainConfig.as_dict() with the channels resolved (model, lmbda, ... included)
    data                number and fingerprint of the training photographs and of the held-out ones
    model               state_dict; `slow`: the slow weights by parameter name, or None without --sma
    optimizer, aux_optimizer, scheduler   their state_dicts (SMA's holds the optimizer it wraps)
    progress            step, epoch, position in the epoch, sums of the epoch, best, skipped
    rng                 cpu and cuda generator states
    versions            torch, compressai
    diagnostics         the last update, or None without --diagnose (older checkpoints lack it)
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from lic_fast.training.errors import TrainingError
from lic_fast.training.files import atomic_write

KIND = "lic_fast.checkpoint"
FORMAT = 1
_FIELDS = "config data model slow optimizer aux_optimizer scheduler progress rng versions".split()


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write `contents` atomically. Raises TrainingError; the previous checkpoint then stays as it was."""
    buffer = io.BytesIO()  # so that a full disk is met by the plain write below and not inside torch's zip writer
    torch.save({"kind": KIND, "format": FORMAT, **contents}, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path: str | Path, command: str) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU. Raises TrainingError: missing, foreign, damaged or newer."""
    path = Path(path)
    if not path.is_file():
        raise TrainingError(f"{command}: no checkpoint at {path}; give the checkpoint.pt that lic-fast train wrote")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(f"{command}: cannot read {path}: {error.strerror or error}; check the file") from error
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        ValueError,
        IndexError,
        AttributeError,
    ) as error:
        raise TrainingError(
            f"{command}: {path} is damaged, cut short, or not a checkpoint of lic-fast train "
            f"({type(error).__name__}); give another one"
        ) from error
    if not isinstance(contents, dict) or contents.get("kind") != KIND:
        raise TrainingError(
            f"{command}: {path} was not written by lic-fast train; give the checkpoint.pt that it wrote"
        )
    if contents.get("format") != FORMAT:
        raise TrainingError(
            f"{command}: {path} has checkpoint format {contents.get('format')}, this version reads {FORMAT}; "
            "use the lic_fast that wrote it"
        )
    missing = [name for name in _FIELDS if name not in contents]
    if missing:
        raise TrainingError(f"{command}: {path} lacks {', '.join(missing)}; give another checkpoint")
    return contents

"""Portable streams of the models that can make them: integer networks at the end of a run, kept in its checkpoint."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lic_fast.training.errors import TrainingError

_PHOTOS = 32  # enough to know what values reach
_logger = logging.getLogger("lic_fast.training")


def make_portable(
    model: torch.nn.Module,
    batches: Iterator[Tensor],
    weights: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Calibrates on the first photographs of batches [B, 3, H, W] in [0, 1]; whether the model is portable then.

    weights: within it, the model has the weights that images are coded with. A model that is not MSPCodec stays as it
    is, and so does one whose weights or photographs do not allow it: a warning says why.
    """
    if not hasattr(model, "make_portable"):
        return False
    photos = itertools.chain.from_iterable(batch.split(1) for batch in batches)
    was_training = model.training
    try:
        with weights():
            model.eval().make_portable(itertools.islice(photos, _PHOTOS))
            model.update(force=True)  # tables are made once: another machine could make slightly other ones
    except (TrainingError, ValueError) as error:
        _logger.warning("train: streams of this checkpoint will not be portable: %s", error)
        return False
    finally:
        model.train(was_training)
    return True


def without_integers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model without the integer networks, which follow no training and no other weights."""
    return {name: value for name, value in state.items() if ".integers." not in name}

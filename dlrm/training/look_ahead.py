"""Batches one ahead: while one is trained, the next is read and on its device, so that its ids can be sent."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dlrm.batch import Batch
from dlrm.training.device_input import copy_ahead
from dlrm.training.stage_times import WAITING_FOR_DATA
from embeddings.stopwatch import Stopwatch


def look_ahead(
    batches: Iterator[Batch], device: torch.device, stopwatch: Stopwatch
) -> Iterator[tuple[Batch, Batch | None]]:
    """Yield each batch on `device`, with the one after it, if there is one.

    Args:
        batches: read by threads of their own.
        device: of the model.
        stopwatch: counts the time until a batch is there.
    """
    batches = copy_ahead(batches, device)

    def take() -> Batch | None:
        with stopwatch.stage(WAITING_FOR_DATA):
            return next(batches, None)

    following = take()
    while following is not None:
        batch, following = following, take()
        yield batch, following

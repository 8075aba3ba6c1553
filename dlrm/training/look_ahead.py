"""Batches one ahead: while one is trained, the next is read and on its device, so that its ids can be sent."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dlrm.batch import Batch
from dlrm.training.device_input import copy_ahead
from dlrm.training.stage_times import WAITING_FOR_DATA
from embeddings.stopwatch import Stopwatch


def look_ahead(
    batches: Iterator[Batch | None], device: torch.device, stopwatch: Stopwatch
) -> Iterator[tuple[Batch, Batch | None]]:
    """Yield each batch on `device`, with the one after it, if there is one already.

    Args:
        batches: read by threads of their own; None where the next one is not there before this one is trained.
        device: of the model.
        stopwatch: counts the time until a batch is there.
    """
    batches = copy_ahead(batches, device)
    over: list[bool] = []

    def take() -> Batch | None:
        with stopwatch.stage(WAITING_FOR_DATA):
            try:
                return next(batches)
            except StopIteration:
                over.append(True)
                return None

    following: Batch | None = None
    while not over:
        batch, following = following, take()
        if batch is not None:
            yield batch, following

"""Batches one ahead: while one is trained, the next is read, on its device, and its ids are on their way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dlrm.batch import Batch
from dlrm.training.stage_times import WAITING_FOR_DATA
from embeddings.interface import Tables
from embeddings.stopwatch import Stopwatch


def look_ahead(
    batches: Iterator[Batch], every_tables: Sequence[Tables], device: torch.device, stopwatch: Stopwatch
) -> Iterator[Batch]:
    """Yield batches on `device`; before each, tables are told of the ids of the one after it.

    Args:
        batches: read by threads of their own.
        every_tables: exchange ids between ranks, if they do.
        device: of the model.
        stopwatch: counts the time until a batch is there.
    """

    def take() -> Batch | None:
        with stopwatch.stage(WAITING_FOR_DATA):
            batch = next(batches, None)
            if batch is None or device.type == "cpu":
                return batch
            return batch.pin_memory().to(device, non_blocking=True)

    following = take()
    while following is not None:
        batch, following = following, take()
        if following is not None:
            for tables in every_tables:
                tables.prefetch(following.sparse)
        yield batch

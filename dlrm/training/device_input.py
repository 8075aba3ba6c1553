"""Batches on their way to the GPU while it computes: pinned by a thread, copied beside the computation's stream."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import torch

from dlrm.batch import Batch

DEPTH = 2
"""Batches that wait on the GPU; one is enough for steps of equal length, the second is for those that are not."""


class _Arrival(NamedTuple):
    batch: Batch | None
    copied: torch.cuda.Event | None


def copy_ahead(batches: Iterator[Batch | None], device: torch.device, *, depth: int = DEPTH) -> Iterator[Batch | None]:
    """Give the same batches on ``device``; on the CPU that is what they are already. None stays None.

    Each is asked for its ids per feature before it leaves, so that nobody has to ask the GPU for them. The iterator
    that comes back must be closed, or run to its end, to let go of its thread.

    Args:
        batches: on the CPU.
        device: of the model.
        depth: number of batches that may wait there.
    """
    if device.type == "cpu":
        return batches
    stream = torch.cuda.Stream(device)

    def copy(batch: Batch | None) -> _Arrival:
        if batch is None:
            return _Arrival(None, None)
        batch.sparse.length_per_key()
        # Copied beside the computation, and waited for there alone where the batch is used.
        with torch.cuda.stream(stream):
            on_device = batch.pin_memory().to(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        return _Arrival(on_device, copied)

    return _in_order(copy_in_background(batches, copy, depth))


def _in_order(arrivals: Generator[_Arrival]) -> Iterator[Batch | None]:
    with contextlib.closing(arrivals):
        for batch, copied in arrivals:
            if batch is not None and copied is not None:
                current = torch.cuda.current_stream(batch.rows.device)
                current.wait_event(copied)
                # Its memory belongs to the copying stream, which must not reuse it before this one is done with it.
                batch.record_stream(current)
            yield batch


def copy_in_background(
    batches: Iterator[Batch | None], copy: Callable[[Batch | None], _Arrival], depth: int
) -> Generator[_Arrival]:
    """Run ``copy`` in a thread, at most ``depth`` batches ahead; what fails there is raised here, in its turn."""
    ready: queue.Queue[_Arrival | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: _Arrival | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def run() -> None:
        try:
            for batch in batches:
                put(copy(batch))
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=run, name="batches to the GPU", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()

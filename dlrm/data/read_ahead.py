"""What readers have in common: where the batches of an endless stream are cut, and reading them ahead in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

AHEAD = 2

BatchSize = Callable[[int], int]
"""Given the samples before a batch, its size."""
Share = Callable[[int], tuple[int, int]]
"""Given the samples of a batch, (first, count) of those to read; `Ranks.share_of` is one."""
Read = TypeVar("Read")


def cut_batches(
    num_rows: int, batch_size: int | BatchSize, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield (first sample, samples) of the batches of samples [start, stop) of a stream; without `stop`, for ever.

    Args:
        num_rows: samples of an epoch; no batch lies in two epochs.
        batch_size: samples per batch; a function is asked when a batch is cut.
        start: number of the first sample in the stream.
        stop: number of the first sample that is left out.
    """
    size_at = batch_size if callable(batch_size) else lambda position: batch_size
    while stop is None or start < stop:
        until_epoch_ends = num_rows - start % num_rows
        wanted = size_at(start)
        count = min(wanted, until_epoch_ends, wanted if stop is None else stop - start)
        yield start, count
        start += count


def read_ahead(read: Callable[[int, int], Read], places: Iterator[tuple[int, int]]) -> Iterator[Read]:
    """Yield what `read` gives of each place, `AHEAD` of which are read by a thread before they are asked for."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader") as pool:
        waiting = [pool.submit(read, *place) for place in islice(places, AHEAD)]
        while waiting:
            batch = waiting.pop(0).result()
            if (place := next(places, None)) is not None:
                waiting.append(pool.submit(read, *place))
            yield batch

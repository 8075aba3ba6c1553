"""Which samples and clocks a chunk of the data has: arithmetic of the description, so none of it is kept."""

from __future__ import annotations

from dataclasses import dataclass

from parameter_server.description import RunDescription

MAX_LANES = 1 << 14


@dataclass(frozen=True, kw_only=True)
class ChunkShape:
    """What is fixed about a chunk, whoever computes it.

    Attributes:
        index: Its place in the stream of chunks, from 0.
        lane: ``index % lanes``.
        epoch: From 0.
        first_clock: Clock of its first batch in its lane, from 1; further batches have the next ones.
        first_sample: In the run's stream of samples (all epochs one after the other), from 0.
        num_samples: At most ``batch_size * chunk_batches``; only an epoch's last batch is smaller than ``batch_size``.
        num_batches: ``ceil(num_samples / batch_size)``.
    """

    index: int
    lane: int
    epoch: int
    first_clock: int
    first_sample: int
    num_samples: int
    num_batches: int


class ChunkPlan:
    """Cuts a run's samples into batches and chunks, none of which crosses an epoch's end.

    Args:
        description: Of the run; with ``epoch_samples`` 0, all samples are one epoch.

    Raises:
        ValueError: When a number of the description cannot be.

    Attributes:
        num_chunks: Of the whole run; 0 where it has no samples.
        lanes: Chunk ``j`` belongs to lane ``j % lanes``.
    """

    def __init__(self, description: RunDescription) -> None:
        for name in (
            "lanes",
            "batch_size",
            "chunk_batches",
            "samples",
            "epoch_samples",
            "first_sample",
            "alone_samples",
        ):
            if type(number := getattr(description, name)) is not int or not 0 <= number < 1 << 62:
                raise ValueError(f"{name}: expected a whole number >= 0, got {number!r}")
        if description.lanes > MAX_LANES:
            raise ValueError(f"lanes: expected at most {MAX_LANES}, got {description.lanes}")
        self.lanes = description.lanes
        self.batch_size = description.batch_size
        self._chunk_batches = description.chunk_batches
        self._alone_samples = description.alone_samples
        self._first, self._end = description.first_sample, description.samples
        self._epoch_samples = description.epoch_samples or description.samples
        if self._first > self._end:
            raise ValueError(f"first_sample: expected one of {self._end} samples, got {self._first}")
        # What is left of the epoch that the run begins in, if it begins within one.
        into = self._first % self._epoch_samples if self._epoch_samples else 0
        self._head_end = min(self._end, self._first + self._epoch_samples - into) if into else self._first
        self._head_chunks, self._head_gap = self._count(self._head_end - self._first)
        self._epoch_chunks, self._epoch_gap = self._count(self._epoch_samples)
        rest = self._end - self._head_end
        epochs, left = divmod(rest, self._epoch_samples) if rest else (0, 0)
        self.num_chunks = self._head_chunks + epochs * self._epoch_chunks + self._count(left)[0]

    def chunk(self, index: int) -> ChunkShape:
        """Gives a chunk.

        Raises:
            ValueError: When there is none of this index.
        """
        if not 0 <= index < self.num_chunks:
            raise ValueError(f"chunk: expected an index below {self.num_chunks}, got {index}")
        if index < self._head_chunks:
            begin, end, place = self._first, self._head_end, index
        else:
            epoch, place = divmod(index - self._head_chunks, self._epoch_chunks)
            begin = self._head_end + epoch * self._epoch_samples
            end = min(begin + self._epoch_samples, self._end)
        first = begin + place * self._chunk_batches * self.batch_size
        num_samples = min(self._chunk_batches * self.batch_size, end - first)
        return ChunkShape(
            index=index,
            lane=index % self.lanes,
            epoch=first // self._epoch_samples,
            first_clock=self._first_clock(index),
            first_sample=first,
            num_samples=num_samples,
            num_batches=-(-num_samples // self.batch_size),
        )

    def is_for_one(self, index: int) -> bool:
        """Says whether a chunk is among the first, which one trainer computes while the others wait."""
        return index < self.num_chunks and self.chunk(index).first_sample < self._alone_samples

    def _count(self, samples: int) -> tuple[int, int]:
        """Says how many chunks samples of one epoch come to, and by how many batches the last one is short."""
        batches = -(-samples // self.batch_size)
        chunks = -(-batches // self._chunk_batches)
        return chunks, chunks * self._chunk_batches - batches

    def _first_clock(self, index: int) -> int:
        """Counts the lane's batches before a chunk: all its chunks are full but those which end an epoch."""
        lane = index % self.lanes
        missing = self._head_gap if index >= self._head_chunks and (self._head_chunks - 1) % self.lanes == lane else 0
        if self._epoch_gap:
            ended = max(0, index - self._head_chunks) // self._epoch_chunks
            last = (self._head_chunks + (epoch + 1) * self._epoch_chunks - 1 for epoch in range(ended))
            missing += self._epoch_gap * sum(chunk % self.lanes == lane for chunk in last)
        return 1 + index // self.lanes * self._chunk_batches - missing

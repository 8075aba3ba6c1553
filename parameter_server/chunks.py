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
        for name in ("lanes", "batch_size", "chunk_batches", "samples", "epoch_samples"):
            if type(number := getattr(description, name)) is not int or not 0 <= number < 1 << 62:
                raise ValueError(f"{name}: expected a whole number >= 0, got {number!r}")
        if description.lanes > MAX_LANES:
            raise ValueError(f"lanes: expected at most {MAX_LANES}, got {description.lanes}")
        self.lanes = description.lanes
        self.batch_size = description.batch_size
        self._chunk_batches = description.chunk_batches
        self._samples = description.samples
        self._epoch_samples = description.epoch_samples or description.samples
        self._epoch_batches = -(-self._epoch_samples // self.batch_size)
        self._epoch_chunks = -(-self._epoch_batches // self._chunk_batches)
        full_epochs, rest = divmod(self._samples, self._epoch_samples) if self._samples else (0, 0)
        self.num_chunks = full_epochs * self._epoch_chunks - (-rest // (self.batch_size * self._chunk_batches))

    def chunk(self, index: int) -> ChunkShape:
        """Gives a chunk.

        Raises:
            ValueError: When there is none of this index.
        """
        if not 0 <= index < self.num_chunks:
            raise ValueError(f"chunk: expected an index below {self.num_chunks}, got {index}")
        epoch, place = divmod(index, self._epoch_chunks)
        start = place * self._chunk_batches * self.batch_size
        in_epoch = min(self._epoch_samples, self._samples - epoch * self._epoch_samples)
        num_samples = min(self._chunk_batches * self.batch_size, in_epoch - start)
        return ChunkShape(
            index=index,
            lane=index % self.lanes,
            epoch=epoch,
            first_clock=self._first_clock(index),
            first_sample=epoch * self._epoch_samples + start,
            num_samples=num_samples,
            num_batches=-(-num_samples // self.batch_size),
        )

    def lane_chunks(self, lane: int) -> int:
        """Says how many chunks a lane has."""
        return max(0, -(-(self.num_chunks - lane) // self.lanes))

    def _first_clock(self, index: int) -> int:
        """Counts the lane's batches before a chunk: all its chunks are full but those which end an epoch."""
        short_by = self._epoch_chunks * self._chunk_batches - self._epoch_batches
        earlier = range(index // self._epoch_chunks) if short_by else range(0)
        lane = index % self.lanes
        short = sum(1 for epoch in earlier if ((epoch + 1) * self._epoch_chunks - 1) % self.lanes == lane)
        return 1 + index // self.lanes * self._chunk_batches - short * short_by

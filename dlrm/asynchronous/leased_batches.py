"""A trainer's batches: the coordinator gives out chunks of the stream, and gets each back when it is in the tables."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple, Protocol

from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.asynchronous.stages import STAGE, Stage
from dlrm.batch import Batch
from dlrm.training.attachments import Attachment, Moment
from dlrm.training.problem import SampleReader
from parameter_server.client.remote_rows import PushPlace
from parameter_server.client.rows_client import LaneLease
from parameter_server.coordinator.answers import Chunk, Finished, Wait

LONGEST_WAIT_SECONDS = 0.5


class Work(Protocol):
    """What a member of a run asks the coordinator for."""

    def next_chunk(self) -> Chunk | Wait | Finished:
        """Ask for data."""

    def complete_chunk(self, chunk: Chunk) -> None:
        """Give data back, trained."""

    def pass_gate(self, batches: int) -> None:
        """Wait until nobody is too far behind to go on, having done so many batches."""


class PlacedTables(Protocol):
    """Tables whose pushes have a place in the stream."""

    def enter(self, features: KeyedJaggedTensor, *places: PushPlace) -> None:
        """Say where the pushes of these features belong, one after the other."""

    @property
    def last_push(self) -> Future[None]:
        """Of a batch: done once all shards have acknowledged it."""


@dataclass(kw_only=True)
class _Open:
    """A chunk that is not given back yet, and how many of its batches are not in the tables."""

    chunk: Chunk
    missing: int


class _Read(NamedTuple):
    """A batch that is not trained yet."""

    opened: _Open
    place: PushPlace
    is_last: bool  # of its chunk


class LeasedBatches(Attachment):
    """Reads the chunks that a trainer is given, and gives one back when all shards have all of its pushes.

    A batch and its clocks, one for each of its pushes, are functions of the stream alone: whoever does a chunk again
    pushes the same rows under the same clocks, and shards leave out what they have.

    Args:
        reader: of the train split.
        work: the coordinator, asked for this member.
        tables: that are told where the pushes of each batch belong.
        is_gated: whether trainers wait for one another.
        pushes: how often a batch updates its rows.

    Attributes:
        stage: what the trainer is at.
    """

    name = "leased_batches"

    def __init__(
        self, reader: SampleReader, work: Work, tables: PlacedTables, *, is_gated: bool, pushes: int = 1
    ) -> None:
        self._pushes = pushes
        self._reader, self._work, self._tables, self._is_gated = reader, work, tables, is_gated
        self._read_ahead: deque[_Read] = deque()
        self._pushed: deque[tuple[_Open, list[Future[Any]]]] = deque()
        self._others: Callable[[], Sequence[Future[Any]]] = tuple
        self._trained, self._loss = 0, float("nan")
        self.stage = Stage.STARTING

    def batches(self, should_stop: Callable[[], bool]) -> Iterator[Batch | None]:
        """Yield batches as long as there are chunks; None before waiting for one that others may leave undone.

        Raises:
            KeyboardInterrupt: it should stop, and there is no step at whose end it could.
        """
        while True:
            given = self._work.next_chunk()
            if isinstance(given, Finished):
                return
            if isinstance(given, Wait):
                yield None  # after which all batches of before are trained
                self.give_back(wait=True)
                if should_stop():
                    raise KeyboardInterrupt("while other trainers have the rest of the data")
                time.sleep(min(given.seconds, LONGEST_WAIT_SECONDS))
            else:
                yield from self._read(given)

    def facts(self) -> dict[str, float]:
        """Return what others are told of this trainer: what it is at, its batches so far, and the last one's loss."""
        told = {"batches": float(self._trained), STAGE: float(self.stage)}
        return told | ({"loss": self._loss} if isfinite(self._loss) else {})

    @property
    def place(self) -> PushPlace:
        """Of the batch that is trained now: that of its first push."""
        return self._read_ahead[0].place

    @property
    def ends_chunk(self) -> bool:
        """Whether the batch that is trained now is the last one of its chunk."""
        return self._read_ahead[0].is_last

    def wait_for(self, others: Callable[[], Sequence[Future[Any]]]) -> None:
        """Give chunks back only when something else of their batches is on the servers too.

        Args:
            others: asked after the step of each batch: what is under way.
        """
        self._others = others

    def _read(self, chunk: Chunk) -> Iterator[Batch]:
        num_batches, stop = -(-chunk.num_samples // chunk.batch_size), chunk.first_sample + chunk.num_samples
        opened = _Open(chunk=chunk, missing=num_batches)
        for index, batch in enumerate(self._reader.batches(chunk.batch_size, start=chunk.first_sample, stop=stop)):
            first = (chunk.first_clock + index - 1) * self._pushes + 1
            lease = LaneLease(chunk.lane, chunk.lease)
            places = [PushPlace(lease, first + number) for number in range(self._pushes)]
            self._tables.enter(batch.sparse, *places)
            self._read_ahead.append(_Read(opened, places[0], index + 1 == num_batches))
            yield batch

    def before_step(self, moment: Moment) -> None:
        """Wait for trainers that are too far behind."""
        if self._is_gated:
            self._work.pass_gate(self._trained)

    def after_step(self, moment: Moment, loss: float) -> None:
        """Give back chunks all of whose batches are in the tables."""
        opened = self._read_ahead.popleft().opened
        self._pushed.append((opened, [self._tables.last_push, *self._others()]))
        self._trained += 1
        self.stage = Stage.TRAINING
        self._loss = loss
        self.give_back(wait=False)

    def give_back(self, *, wait: bool) -> None:
        """Give back the chunks that are complete.

        Args:
            wait: for all that has been trained.

        Raises:
            ConnectionError: a shard was not to be reached.
            ValueError: a push was refused.
        """
        while self._pushed and (wait or all(push.done() for push in self._pushed[0][1])):
            opened, pushes = self._pushed.popleft()
            for push in pushes:
                push.result()
            opened.missing -= 1
            if not opened.missing:
                self._work.complete_chunk(opened.chunk)

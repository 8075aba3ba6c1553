"""What the loop does not know: how data become batches, what is minimised, and how a model is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dlrm.config import GuardConfig, TrainingConfig
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.training.task import Task
from embeddings.stopwatch import Stopwatch


class Prepared(Protocol):
    """Prepared data, whatever they are of."""

    folder: Path

    @property
    def fingerprint(self) -> str:
        """Data that agree in it are the same."""

    def rows(self, split: str) -> int:
        """Return the number of samples of a split; 0 if there is no such split."""


class SampleReader(Protocol):
    """The stream of a split's samples, of which number p depends on the data, the seed and p alone."""

    split: str
    num_rows: int  # of an epoch

    def batches(
        self,
        batch_size: int | Callable[[int], int],
        *,
        start: int = 0,
        stop: int | None = None,
        share: Callable[[int], tuple[int, int]] | None = None,
    ) -> Iterator[Any]:
        """Yield the batches of samples [start, stop); see `dlrm.data.reader.Reader`."""


class Values(Protocol):
    """What an evaluation gives: a number for each metric, as an attribute of its name."""

    @property
    def samples(self) -> int:
        """How many were measured."""

    @property
    def undefined(self) -> str | None:
        """Why some numbers are NaN; None if none is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a model is measured.

    Attributes:
        device: the model's.
        folder: the run's, for temporary files.
        ranks: who else measures; all get the same values.
        stopwatch: counts the time.
    """

    device: torch.device
    folder: Path
    ranks: Ranks = ALONE
    stopwatch: Stopwatch


class Problem(ABC):
    """Something to learn from prepared data.

    Attributes:
        dataset: the data.
        numeric_names: of the columns of `Batch.dense`, named in errors.
    """

    dataset: Prepared
    numeric_names: tuple[str, ...] = ()

    @abstractmethod
    def check(self, model: nn.Module, config: TrainingConfig) -> None:
        """Check that model, data and settings suit one another, before anything is trained.

        Raises:
            ValueError: naming the table, the flag or the file.
        """

    @abstractmethod
    def reader(self, split: str, config: TrainingConfig) -> SampleReader:
        """Open a split: `train` in the order of the run, others as they lie."""

    @abstractmethod
    def task(self, model: nn.Module, config: TrainingConfig, ranks: Ranks) -> Task:
        """Make what a step minimises."""

    @abstractmethod
    def measure(self, model: nn.Module, reader: SampleReader, config: TrainingConfig, place: Place) -> Values:
        """Measure a model on one pass over a split (a collective call)."""

    @abstractmethod
    def describe(self, values: Any, config: TrainingConfig) -> dict[str, Any]:
        """Return what is recorded of a measurement, by name; the samples measured are `split_samples`."""

    @abstractmethod
    def tell(self, values: Any) -> str:
        """Say in a few words what was measured."""

    def finish(self, model: nn.Module, reader: SampleReader, values: Any, place: Place) -> dict[str, Any]:
        """Return what else the summary of a run holds, once it has ended (a collective call)."""
        return {}

    def is_at_chance(self, values: Any) -> bool:
        """Whether a model is as good as one that has learned nothing."""
        return False

    def complaint(
        self, values: Any, evaluations_at_chance: int, guards: GuardConfig, *, last: bool = False
    ) -> str | None:
        """Say what is wrong with an evaluation, or nothing; after the `last` one two at chance are enough."""
        return None

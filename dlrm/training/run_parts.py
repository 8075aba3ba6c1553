"""What of a run is at hand when its attachments are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from dlrm.config import TrainingConfig
from dlrm.distributed.ranks import Ranks
from dlrm.training.attachments import Attachment
from dlrm.training.batch_sizes import BatchSizes
from dlrm.training.problem import Prepared, Problem


@dataclass(frozen=True, kw_only=True, eq=False)
class RunParts:
    """What attachments are made of.

    Attributes:
        config: of the run.
        model: on its device, with its tables.
        problem: that is learned.
        optimizer: of the dense part.
        sizes: of batches, now and later.
        ranks: who else trains.
        others: makes attachments that come last, of these parts.
    """

    config: TrainingConfig
    model: nn.Module
    problem: Problem
    optimizer: Optimizer
    sizes: BatchSizes
    ranks: Ranks
    others: Callable[[RunParts], Sequence[Attachment]] | None = None

    @property
    def dataset(self) -> Prepared:
        """The data."""
        return self.problem.dataset

"""What a step minimises: a module that maps a batch to its loss, in one pass over the batch or in several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from embeddings.interface import Tables


class Task(nn.Module, ABC):
    """Maps a batch to (loss, output); the loss is a scalar in float32, the mean over the batch, and 0 for an empty one.

    Attributes:
        passes: What a step does with a batch, one after the other: each is a forward pass, a backward pass and an
            update of the parameters that have a gradient then.
    """

    passes: tuple[str, ...] = ("",)

    def enter(self, name: str) -> None:
        """Say which of the passes the next `forward` is of."""

    @abstractmethod
    def forward(self, batch: Any) -> tuple[Tensor, Any]:
        """Return the loss of a batch, and what the model made of it."""

    def check(self, batch: Any, split: str) -> None:
        """Check what must hold of a batch, once a device has been waited for.

        Raises:
            ValueError: naming the row of the split.
        """

    def stand_in(self) -> None:
        """Take part in what ranks tell one another during backward, on one that has no loss to run it from."""

    def repeating(self) -> AbstractContextManager[None]:
        """Around a forward pass that this rank runs once more by itself, to see what was wrong with it."""
        return nullcontext()

    def prepare(self, following: Any) -> None:
        """Do what the next batch needs of the present weights; all ranks call it alike."""

    def prefetch(self, following: Any, tables: Sequence[Tables]) -> None:
        """Let the ids of the next batch travel; all ranks call it alike."""
        for each in tables:
            each.prefetch(following.sparse)

    def prepared(self) -> Mapping[str, Tensor]:
        """Return what was done so for this rank's share of the next batch, which a resumed run needs."""
        return {}

    def load_prepared(self, state: Mapping[str, Any]) -> None:
        """Go on from what `prepared` returned; a rank that had no part in the save gets something else."""

    def values(self) -> Mapping[str, float]:
        """Return what is logged beside the loss, by name: means since it was asked for last (a collective call)."""
        return {}

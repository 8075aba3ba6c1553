"""All of a run that a checkpoint holds, taken from its live parts and put back into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dlrm.checkpoints.optimizer_state import load_optimizer
from dlrm.checkpoints.run_state import load_model, load_random_state, take_model, take_random_state
from dlrm.config import ResizedTables
from dlrm.training.attachments import Attachments
from dlrm.training.batch_sizes import BatchSizes
from dlrm.training.course import Course, Progress
from dlrm.training.problem import Prepared
from dlrm.training.task import Task
from embeddings.stopwatch import Stopwatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """The live parts of a run.

    Attributes:
        model: its tables may lie on other ranks than those of the run that was saved.
        optimizer: of the dense part.
        course: how far the run has come.
        sizes: of batches.
        attachments: who else takes part.
        task: with what it has prepared for the next batch.
        stopwatch: of the run's stages.
        device: whose generator is drawn from.
        dataset: that is learned.
    """

    model: nn.Module
    optimizer: Optimizer
    course: Course
    sizes: BatchSizes
    attachments: Attachments
    task: nn.Module
    stopwatch: Stopwatch
    device: torch.device
    dataset: Prepared

    def take(self) -> dict[str, Any]:
        """Return the run's state; tensors are the live ones."""
        return {
            **take_model(self.model),
            "dense_optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.course.progress) | {"dataset": self.dataset.fingerprint},
            "stage_seconds": dict(self.stopwatch.seconds),
            "random": take_random_state(self.device),
            "batch_sizes": self.sizes.state(),
            "attachments": self.attachments.state(),
            "prepared": dict(self.task.prepared()) if isinstance(self.task, Task) else {},
        }

    def load(self, state: Mapping[str, Any], *, resized_tables: ResizedTables) -> list[str]:
        """Set the run to a state that was taken; return a line for each table that was resized.

        Raises:
            ValueError: it is of other data, of another model or of another optimizer.
        """
        progress = dict(state["progress"])
        if progress.pop("dataset") != self.dataset.fingerprint:
            raise ValueError(
                f"expected a checkpoint that was trained on {self.dataset.folder}, got one of other data; choose "
                "another --output"
            )
        resized = load_model(self.model, state, resized_tables=resized_tables)
        load_optimizer(self.optimizer, state["dense_optimizer"])
        self.course.progress = Progress(**progress)
        if resized:  # the best one so far was of other tables
            self.course.forget_best()
        if "rank" not in state["stage_seconds"]:  # of a rank that had a part in the save
            self.stopwatch.seconds.update(state["stage_seconds"])
        load_random_state(state["random"], self.device)
        if "batch_sizes" in state:  # runs were saved without them once, of one size and with nobody attached
            self.sizes.load_state(state["batch_sizes"])
        self.attachments.load_state(state.get("attachments", {}))
        if isinstance(self.task, Task):
            self.task.load_prepared(state.get("prepared", {}))
        return list(resized)

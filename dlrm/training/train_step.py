"""One step: learning rates, forward, loss, backward (in which tables update their rows), dense update."""

from __future__ import annotations

import contextlib
import math
import shutil
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dlrm.batch import Batch
from dlrm.config import StepConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.training.guards import NonFiniteLossError, check_batch, check_logits, find_first_nonfinite, find_tables
from embeddings import IdOutOfRangeError
from embeddings.stopwatch import Stopwatch


class ClickTask(nn.Module):
    """Any model that maps a `Batch` to logits, with the mean binary cross-entropy as its loss.

    Args:
        model: `model(batch)` gives logits [B].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar in float32, and the logits [B]."""
        logits = self.model(batch).float()
        check_logits(logits, batch)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


class TrainStep:
    """Trains a task on one batch after the other.

    Args:
        task: `task(batch)` gives (loss, output); the loss is the mean over the batch.
        dense_optimizer: of all parameters; tables update their own rows.
        dense_schedule: factor on the dense optimizer's learning rates.
        tables_schedule: factor on the tables' learning rates.
        precision: `bf16` runs the forward pass under autocast.
        stopwatch: takes the step's time apart.
        split: named in errors.
        numeric_names: of the columns of `Batch.dense`, named in errors.
    """

    def __init__(
        self,
        task: nn.Module,
        dense_optimizer: torch.optim.Optimizer,
        *,
        dense_schedule: Schedule,
        tables_schedule: Schedule,
        precision: str = "fp32",
        stopwatch: Stopwatch | None = None,
        split: str = "train",
        numeric_names: tuple[str, ...] = (),
    ) -> None:
        self.task, self.dense_optimizer = task, dense_optimizer
        self.dense_schedule, self.tables_schedule = dense_schedule, tables_schedule
        self.precision, self.split, self.numeric_names = precision, split, numeric_names
        self.stopwatch = stopwatch or Stopwatch()
        self.tables = find_tables(task)
        self._base_learning_rates = [float(group["lr"]) for group in dense_optimizer.param_groups]
        for tables in self.tables:
            _time_calls(tables, self.stopwatch, "table lookup")

    def __call__(self, batch: Batch, samples: int) -> float:
        """Train on a batch and return its loss; `samples` counts all samples up to the end of this batch.

        Raises:
            NonFiniteLossError: before anything was updated with it.
            ValueError: an id lies outside its table, or a label is not 0 or 1.
        """
        check_batch(batch, self.split)
        self._set_learning_rates(samples - len(batch) / 2)
        with self.stopwatch.stage("dense forward"):
            loss = self._forward(batch)
        value = float(loss.item())
        if not math.isfinite(value):
            part = find_first_nonfinite(self.task, batch, self.numeric_names)
            raise NonFiniteLossError(loss=value, samples=samples, part=part)
        with self.stopwatch.stage("backward and row update"):
            self.dense_optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with self.stopwatch.stage("dense update"):
            self.dense_optimizer.step()
        return value

    def _forward(self, batch: Batch) -> Tensor:
        try:
            with autocast(self.precision, batch.labels.device.type):
                loss: Tensor = self.task(batch)[0]
        except IdOutOfRangeError as error:
            raise ValueError(f"row {int(batch.rows[error.bag])} of split '{self.split}': {error}") from error
        return loss

    def _set_learning_rates(self, samples: float) -> None:
        factor = self.dense_schedule.factor(samples)
        for group, base in zip(self.dense_optimizer.param_groups, self._base_learning_rates, strict=True):
            group["lr"] = base * factor
        for tables in self.tables:
            tables.set_learning_rate_factor(self.tables_schedule.factor(samples))


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """Return the context in which a forward pass has the asked-for precision."""
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def _time_calls(module: nn.Module, stopwatch: Stopwatch, stage: str) -> None:
    opened: list[AbstractContextManager[None]] = []

    def start(*_: Any) -> None:
        if module.training:  # in an evaluation it is part of that
            opened.append(stopwatch.stage(stage))
            opened[-1].__enter__()

    def stop(*_: Any) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(start)
    module.register_forward_hook(stop, always_call=True)


def choose_device(asked: str) -> torch.device:
    """Return the device to train on.

    Raises:
        ValueError: a GPU was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ValueError("--step.device cuda: expected a GPU that torch can use, found none; see `recforge doctor`")
    return torch.device("cuda" if available and asked != "cpu" else "cpu")


def compile_dense(model: nn.Module, device: torch.device) -> None:
    """Compile the dense part of a model (its `dense` module, else the whole of it) at its first call.

    Raises:
        ValueError: on a CPU without a C++ compiler.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ValueError(
            "--step.compile: expected g++ or clang++ on the PATH, found neither; install one or leave it off"
        )
    part: nn.Module = getattr(model, "dense", model)
    part.compile()


def describe_step(config: StepConfig, device: torch.device, threads: int) -> list[str]:
    """Say what was chosen for the step and why, a line per choice."""
    lines = [f"device {device.type}" + (" (--step.device)" if config.device != "auto" else " (auto)")]
    lines.append(f"{threads} CPU threads " + ("(--step.threads)" if config.threads else "(every core of this process)"))
    if config.precision == "bf16":
        lines.append("dense part in bf16 (--step.precision bf16); rows, loss and optimizers in fp32")
    else:
        lines.append("dense part in fp32 (the default; --step.precision bf16 may be faster where the hardware has it)")
    compiled = "compiled (--step.compile)" if config.compile else "not compiled (the default; --step.compile does)"
    lines.append(f"dense part {compiled}")
    return lines

"""One step: learning rates, forward, loss, backward (in which tables update their rows), dense update."""

from __future__ import annotations

import contextlib
import math
import shutil
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from dlrm.batch import Batch
from dlrm.config import StepConfig
from dlrm.distributed.parallelize import Control, DenseReducer
from dlrm.distributed.ranks import ALONE
from dlrm.optim.steering import Steering
from dlrm.training.attachments import Attachments, Moment
from dlrm.training.guards import (
    NonFiniteLossError,
    check_batch,
    check_logits,
    find_first_nonfinite,
    find_tables,
    name_row,
    naming_rows,
)
from dlrm.training.task import Task
from embeddings import IdOutOfRangeError
from embeddings.stopwatch import Stopwatch


class ClickTask(Task):
    """Any model that maps a `Batch` to logits, with the mean binary cross-entropy as its loss.

    Args:
        model: `model(batch)` gives logits [B].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar in float32 (0 for an empty batch), and the logits [B]."""
        return self.loss_of(batch, self.model(batch))

    @override
    def check(self, batch: Batch, split: str) -> None:
        check_batch(batch, split)

    def loss_of(self, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of logits [B], as `forward` does."""
        logits = logits.float()
        check_logits(logits, batch)
        if not len(batch):
            return logits.sum(), logits.detach()
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


class Wishes(NamedTuple):
    """What may end a run between two steps; one rank that wishes it is enough."""

    asked_to_stop: bool = False
    time_is_up: bool = False


NO_WISHES = Wishes()


class TrainStep:
    """Trains a task on one batch after the other; on several ranks, each on its share of every batch.

    Gradients are those of the mean loss over the whole batch: a rank's mean counts with its share of the samples, and
    gradients are summed over ranks.

    Args:
        task: `task(batch)` gives (loss, output); the loss is the mean over the batch, and 0 for an empty one.
        dense_optimizer: of all parameters; tables update their own rows.
        steering: sets learning rates; None leaves them as they are.
        attachments: who else takes part.
        precision: `bf16` runs the forward pass under autocast.
        stopwatch: takes the step's time apart.
        split: named in errors.
        numeric_names: of the columns of `Batch.dense`, named in errors.
        reducer: sums dense gradients over ranks; None where there is but one.
    """

    def __init__(
        self,
        task: nn.Module,
        dense_optimizer: torch.optim.Optimizer,
        *,
        steering: Steering | None = None,
        attachments: Attachments | None = None,
        precision: str = "fp32",
        stopwatch: Stopwatch | None = None,
        split: str = "train",
        numeric_names: tuple[str, ...] = (),
        reducer: DenseReducer | None = None,
    ) -> None:
        self.task, self.dense_optimizer, self.reducer = task, dense_optimizer, reducer
        self.attachments = attachments or Attachments()
        self.precision, self.split, self.numeric_names = precision, split, numeric_names
        self.stopwatch = stopwatch or Stopwatch()
        self.agreed: Wishes | None = None  # what some rank has wished in the last step, where there are several
        self.tables = find_tables(task)
        self._looked_up: list[Any] = []  # by all tables since the step began
        self.steering = steering or Steering(dense_optimizer, self.tables)
        for tables in self.tables:
            tables.stopwatch = self.stopwatch
            _watch_calls(tables, self.stopwatch, self._looked_up)

    def __call__(
        self,
        batch: Batch,
        samples: int,
        wishes: Wishes = NO_WISHES,
        following: Batch | None = None,
        *,
        batch_size: int | None = None,
    ) -> float:
        """Train on a batch, or a share of one, and return the mean loss over all ranks' samples.

        Args:
            batch: its `global_size` says how many samples all ranks have together.
            samples: number of all samples up to the end of this batch, over all ranks.
            wishes: this rank's; afterwards `agreed` holds what any rank has wished.
            following: the next batch, whose ids travel while this one's gradients are computed.
            batch_size: in force, where this batch may be smaller, as the last one of an epoch is.

        Raises:
            NonFiniteLossError: before a dense weight was updated with it, and alone in a process, a row; on every rank.
            ValueError: an id lies outside its table, or a label is not 0 or 1.
        """
        global_size = len(batch) if batch.global_size is None else batch.global_size
        moment = Moment(batch, samples - global_size, global_size, batch_size or global_size)
        self.attachments.before_step(moment)
        position = self.attachments.position(samples - global_size / 2)
        self.steering.set(position, moment.batch_size, self.attachments.factor)
        *earlier, last = self.task.passes if isinstance(self.task, Task) else ("",)
        means = [self._run_pass(name, moment, samples, wishes, None) for name in earlier]
        means.append(self._run_pass(last, moment, samples, wishes, following))
        self.attachments.after_step(moment, means[0])
        return means[0]

    def _run_pass(self, name: str, moment: Moment, samples: int, wishes: Wishes, following: Batch | None) -> float:
        """Run forward and backward once, update what has a gradient, and return the mean loss over all ranks."""
        batch = moment.batch
        self._looked_up.clear()
        if isinstance(self.task, Task):
            self.task.enter(name)
        if self.reducer is None:
            # Before forward: gradients may lie where a CUDA graph's next replay writes.
            self.dense_optimizer.zero_grad(set_to_none=True)
        with self.stopwatch.stage("dense forward"):
            loss = self._forward(batch)
            mean = float(loss.item())
        # Here, where a GPU has been waited for; earlier, it would be waited for twice.
        failure = self._check_labels(batch) or self._check_ids(batch)
        if failure is None and not math.isfinite(mean):
            failure = self._explain(mean, samples, batch)
        if failure is not None and self.reducer is None:
            raise failure
        if following is not None:
            self._prepare(following)
        if self.reducer is None:
            with self.stopwatch.stage("dense backward"):
                loss.backward()
        else:
            control = Control(mean * len(batch), len(batch), 0, *wishes)
            mean = self._run_backward(self.reducer, loss * (len(batch) / moment.global_size), control, failure)
        self._looked_up.clear()
        self.attachments.after_backward(moment)
        with self.stopwatch.stage("dense update"):
            self.dense_optimizer.step()
        return mean

    def _prepare(self, following: Batch) -> None:
        """Begin with the next batch while the weights are still those of this one."""
        if isinstance(self.task, Task):
            ranks = ALONE if self.reducer is None else self.reducer.ranks
            with naming_rows(following, self.split, ranks), autocast(self.precision, following.rows.device.type):
                self.task.prepare(following)
            self.task.prefetch(following, self.tables)

    def _run_backward(self, reducer: DenseReducer, loss: Tensor, control: Control, failure: ValueError | None) -> float:
        """Run backward and sum gradients over ranks; a rank that has failed takes part, with zeros, up to the end."""
        reducer.begin(control if failure is None else control._replace(loss=0.0, failures=1.0))
        with self.stopwatch.stage("dense backward"):
            if failure is None:
                loss.backward()
            else:
                self._stand_in()
        with self.stopwatch.stage("exposed all-reduce"):
            total = reducer.finish()
        if total.failures:
            reducer.ranks.raise_any(failure)
        self.agreed = Wishes(total.asked_to_stop > 0, total.time_is_up > 0)
        return total.loss / total.samples

    def _stand_in(self) -> None:
        """Take part in others' backward passes with zeros."""
        if isinstance(self.task, Task):
            self.task.stand_in()
        vectors = [value for output in self._looked_up for value in _vectors_of(output) if value.requires_grad]
        if vectors:
            torch.autograd.backward(vectors, [torch.zeros_like(value) for value in vectors])

    def _check_labels(self, batch: Batch) -> ValueError | None:
        try:
            if isinstance(self.task, Task):
                self.task.check(batch, self.split)
        except ValueError as error:
            return error
        return None

    def _check_ids(self, batch: Batch) -> ValueError | None:
        try:
            for tables in self.tables:
                tables.check_ids()
        except IdOutOfRangeError as error:
            return name_row(error, batch, self.split)
        return None

    def _explain(self, loss: float, samples: int, batch: Batch) -> NonFiniteLossError:
        part = find_first_nonfinite(self.task, batch, self.numeric_names, self._looked_up)
        if self.reducer is not None:
            part += f" (on rank {self.reducer.ranks.rank})"
        return NonFiniteLossError(loss=loss, samples=samples, part=part)

    def _forward(self, batch: Batch) -> Tensor:
        ranks = ALONE if self.reducer is None else self.reducer.ranks
        with naming_rows(batch, self.split, ranks), autocast(self.precision, batch.rows.device.type):
            loss: Tensor = self.task(batch)[0]
        return loss


def _vectors_of(looked_up: Any) -> list[Tensor]:
    """Return the tensors of a look-up: one of pooled tables, and of unpooled ones one for each feature."""
    parts = looked_up.values()
    return [parts] if isinstance(parts, Tensor) else [part.values() for part in parts]


def set_matmul_precision(precision: str) -> None:
    """Let a GPU's matrix products, and cuDNN's, shorten their factors, or keep it from doing so."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """Return the context in which a forward pass has the asked-for precision."""
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def _watch_calls(module: nn.Module, stopwatch: Stopwatch, outputs: list[Any]) -> None:
    """Count the time of training's look-ups, and keep what came out of them."""
    opened: list[AbstractContextManager[None]] = []

    def start(*_: Any) -> None:
        if module.training:  # in an evaluation it is part of that
            opened.append(stopwatch.stage("lookup"))
            opened[-1].__enter__()

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)
            outputs.append(output)

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


def compile_dense(model: nn.Module, device: torch.device, *, cuda_graphs: bool = False) -> None:
    """Compile the dense part of a model (its `dense` module, else the whole of it) at its first call.

    A batch of another size, as the last one may be, is compiled for any size, and as a graph recorded on its own.

    Args:
        model: of which the tables are left as they are.
        device: the model's.
        cuda_graphs: replay it as CUDA graphs.

    Raises:
        ValueError: see `check_compile`.
    """
    check_compile(device, cuda_graphs=cuda_graphs)
    part: nn.Module = getattr(model, "dense", model)
    part.compile(mode="reduce-overhead" if cuda_graphs else None)


def check_compile(device: torch.device, *, cuda_graphs: bool) -> None:
    """Check that the dense part can be compiled, before there are data and a model to wait for.

    Raises:
        ValueError: on a CPU without a C++ compiler, or asked for CUDA graphs.
    """
    if cuda_graphs and device.type != "cuda":
        raise ValueError(f"--step.cuda-graphs: expected --step.device cuda, got {device.type}")
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ValueError(
            "--step.compile: expected g++ or clang++ on the PATH, found neither; install one or leave it off"
        )


def describe_step(config: StepConfig, device: torch.device, threads: int, *, ranks_on_machine: int = 1) -> list[str]:
    """Say what was chosen for the step and why, a line per choice."""
    lines = [f"device {device.type}" + (" (--step.device)" if config.device != "auto" else " (auto)")]
    why = "every core of this process"
    if ranks_on_machine > 1:
        why = f"on each of {ranks_on_machine} ranks of this machine: its cores / ranks"
    lines.append(f"{threads} CPU threads ({'--step.threads' if config.threads else why})")
    if config.precision == "bf16":
        lines.append("dense part in bf16 (--step.precision bf16); rows, loss and optimizers in fp32")
    elif config.precision == "tf32":
        lines.append("dense part in fp32 with factors of 10 bits on a GPU (--step.precision tf32)")
    else:
        lines.append("dense part in fp32 (the default; --step.precision bf16 may be faster where the hardware has it)")
    compiled = "compiled (--step.compile)" if config.compile else "not compiled (the default; --step.compile does)"
    graphs = ", replayed as CUDA graphs (--step.cuda-graphs)" if config.cuda_graphs else ""
    lines.append(f"dense part {compiled}{graphs}")
    return lines

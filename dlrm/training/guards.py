"""Checks that are on by default: a run that cannot come to anything stops, and says in one line why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from dlrm.batch import Batch
from dlrm.config import GuardConfig
from dlrm.data.dataset import Dataset
from dlrm.distributed.ranks import Ranks
from dlrm.diverged import DivergedError
from dlrm.metrics.metrics import MetricValues
from dlrm.this_machine import memory_bytes
from dlrm.training.task import Task
from embeddings import IdOutOfRangeError, TableConfig
from embeddings.interface import Tables
from embeddings.planning.table_cost import shard_bytes
from embeddings.tables import OtherRanksIdError

IN_THE_DATA = "the data"


class NonFiniteLossError(DivergedError):
    """The loss is NaN or infinite; `part` names where the first such number came from, `kept` what is saved."""

    def __init__(self, *, loss: float, samples: int, part: str, kept: str = "") -> None:
        cure = (
            "correct the source and prepare it again"
            if part.startswith(IN_THE_DATA)
            else "lower --dense.learning-rate or --tables.learning-rate, or lengthen their warm-up"
        )
        super().__init__(
            f"expected a finite loss, got {loss} after {samples} samples; first in {part}; "
            f"{kept + '; ' if kept else ''}{cure}"
        )
        self.loss, self.samples, self.part = loss, samples, part

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how to make it anew on another rank."""
        return partial(NonFiniteLossError, loss=self.loss, samples=self.samples, part=self.part), ()

    def with_what_is_kept(self, kept: str) -> NonFiniteLossError:
        """Return the same error, which also says what is saved of the run."""
        return NonFiniteLossError(loss=self.loss, samples=self.samples, part=self.part, kept=kept)


def check_model_fits(model: nn.Module, dataset: Dataset) -> None:
    """Check that every table has its feature in the data, and enough rows for its ids.

    Raises:
        ValueError: naming the table, the feature and both numbers.
    """
    known = {feature.name: feature for feature in dataset.info.features}
    for tables in find_tables(model):
        for table in tables.table_configs:
            for name in table.features:
                if name not in known:
                    raise ValueError(
                        f"table '{table.name}': expected a feature '{name}' in {dataset.folder}, which has "
                        f"{', '.join(known)}; correct the table's features or prepare the data with that column"
                    )
                if known[name].num_rows > table.num_rows:
                    raise ValueError(
                        f"table '{table.name}': feature '{name}' of {dataset.folder} has ids up to "
                        f"{known[name].num_rows - 1}, expected less than num_rows = {table.num_rows}; raise num_rows"
                    )


def check_shares(model: nn.Module, ranks: Ranks) -> None:
    """Check that ranks hold every table once between them (a collective call).

    Raises:
        ValueError: naming the table; every rank has all of it, and would train rows of its own.
    """
    if ranks.count == 1:
        return
    every_table: list[TableConfig] = []
    held: list[float] = []
    for tables in find_tables(model):  # one by one, as two sets may have tables of the same name
        numbers = {table.name: 0.0 for table in tables.table_configs}
        for rows in tables.rows():
            numbers[rows.config.name] += rows.weight.numel() if rows.is_primary else 0
        every_table += tables.table_configs
        held += numbers.values()
    for table, total in zip(every_table, ranks.sum(held), strict=True):
        if total != table.num_rows * table.dim:
            raise ValueError(
                f"table '{table.name}': expected {ranks.count} ranks to hold its {table.num_rows} rows once, got "
                f"{total / table.dim:g} rows; give build_tables or DLRM a plan for {ranks.count} ranks"
            )


def check_memory(tables: Sequence[TableConfig]) -> None:
    """Check that rows with their optimizers' state, and a checkpoint's copy of them, fit into this machine's memory.

    Raises:
        ValueError: naming both sizes and the largest table.
    """
    sizes = {table.name: shard_bytes(table, table.num_rows, table.dim) for table in tables}
    needed, available = 2 * sum(sizes.values()), memory_bytes()
    if needed > available:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"tables: expected rows and their copy in a checkpoint to fit into {available / 1e9:.1f} GB of memory, got "
            f"{needed / 1e9:.1f} GB, most of it table '{largest}' ({2 * sizes[largest] / 1e9:.1f} GB); lower "
            "--model.dim, or prepare the data with fewer rows (num_rows, min_count)"
        )


def check_segments(dataset: Dataset, name: str | None) -> None:
    """Check that evaluations can be divided by the column `name`, before anything is trained.

    Raises:
        ValueError: naming the flag, and the columns that there are.
    """
    split = next((split for split in dataset.info.splits if dataset.rows(split)), None)
    if name is None or split is None:
        return
    try:
        dataset.column(split, name, np.zeros(1, dtype=np.int64))
    except ValueError as error:
        raise ValueError(f"--evaluation.segment-by: {error}") from error


def check_batch(batch: Batch, split: str) -> None:
    """Check that labels are 0 or 1.

    Raises:
        ValueError: naming the row of the split and the label.
    """
    wrong = (batch.labels != 0) & (batch.labels != 1)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"row {int(batch.rows[at])} of split '{split}': expected a label of 0 or 1, got "
            f"{float(batch.labels[at]):g}; correct the source, or set the schema's label_threshold, and prepare again"
        )


@contextmanager
def naming_rows(batch: Batch, split: str, ranks: Ranks) -> Iterator[None]:
    """Around a look-up: on every rank, name an id outside its table by its row of the split.

    Raises:
        ValueError: there is such an id, on some rank.
    """
    try:
        yield
    except (IdOutOfRangeError, OtherRanksIdError) as error:
        named = name_row(error, batch, split) if isinstance(error, IdOutOfRangeError) else None
        if ranks.count > 1 and getattr(error, "others_know", True):
            ranks.raise_any(named)
        raise named or error from error


def name_row(error: IdOutOfRangeError, batch: Batch, split: str) -> ValueError:
    """Return the error with the row of the split that holds the id."""
    return ValueError(f"row {int(batch.rows[error.bag])} of split '{split}': {error}")


def check_logits(logits: Tensor, batch: Batch) -> None:
    """Check that a model gives one logit per sample.

    Raises:
        ValueError: naming both shapes.
    """
    if logits.shape != batch.labels.shape:
        raise ValueError(f"model: expected logits of shape {tuple(batch.labels.shape)}, got {tuple(logits.shape)}")


def find_tables(model: nn.Module) -> list[Tables]:
    """Return every set of tables within a model."""
    return [module for module in model.modules() if isinstance(module, Tables)]


@torch.no_grad()
def find_first_nonfinite(
    model: nn.Module, batch: Batch, numeric_names: tuple[str, ...] = (), looked_up: Sequence[KeyedTensor] = ()
) -> str:
    """Run the forward pass again and name the first part with a NaN or an infinity: input, weight, table or layer.

    Args:
        model: whose forward pass gave it.
        batch: on which it did.
        numeric_names: of the columns of `batch.dense`.
        looked_up: what its tables gave, call by call; they are not asked again, for other ranks would have to answer.
    """
    dense: Tensor | None = getattr(batch, "dense", None)  # sequences have no numbers
    if dense is not None and not bool(dense.isfinite().all()):
        row, column = (int(i) for i in (~dense.isfinite()).nonzero()[0])
        name = numeric_names[column] if column < len(numeric_names) else str(column)
        return f"{IN_THE_DATA}: numeric column '{name}' of row {int(batch.rows[row])}"
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the weight '{name}'"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_note_nonfinite(name or type(module).__name__, batch, found))
        for name, module in model.named_modules()
    ]
    try:
        with _replay(find_tables(model), looked_up), model.repeating() if isinstance(model, Task) else nullcontext():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the gradient or the loss itself"


@contextmanager
def _replay(every_tables: Sequence[Tables], looked_up: Sequence[KeyedTensor]) -> Iterator[None]:
    """Let tables give again, in the same order, what they gave before."""
    outputs = iter(list(looked_up))
    for tables in every_tables:
        tables.__dict__["forward"] = lambda features: next(outputs)
    try:
        yield
    finally:
        for tables in every_tables:
            del tables.__dict__["forward"]


def _note_nonfinite(name: str, batch: Batch, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and isinstance(output, dict):  # of unpooled tables
            wrong = (feature for feature, part in output.items() if not bool(part.values().isfinite().all()))
            found.extend(f"the rows of feature '{feature}'" for feature in wrong)
            return
        values = output.values() if isinstance(output, KeyedTensor) else output
        if found or not isinstance(values, Tensor) or bool(values.isfinite().all()):
            return
        found.append(f"the output of '{name}'")
        if isinstance(output, KeyedTensor):
            at = int((~values.isfinite()).nonzero()[0, 1])
            ends = torch.tensor(output.length_per_key()).cumsum(0)
            feature = output.keys()[int(torch.searchsorted(ends, at, right=True))]
            row = int((~values.isfinite()).nonzero()[0, 0])
            found[0] = f"the rows of feature '{feature}' looked up for row {int(batch.rows[row])}"

    return note


class LearningGuard:
    """Stops a run whose predictions are all alike, or whose AUC stays where a coin would put it.

    Args:
        config: which checks are on.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config

    def complaint(self, values: MetricValues, evaluations_at_chance: int, *, last: bool = False) -> str | None:
        """Return what is wrong with an evaluation, or None; after the `last` one two at chance are enough."""
        if self.config.constant_prediction and values.prediction_std == 0 and values.samples > 1:
            return (
                f"every one of {values.samples} predictions is {values.mean_prediction:.6g}; the model cannot tell "
                "samples apart: look for dead ReLUs or zero tables (--dense.learning-rate, --tables.init-scale)"
            )
        limit = self.config.chance_evaluations
        if limit and evaluations_at_chance >= (min(2, limit) if last else limit):
            return (
                f"AUC is {values.auc:.4f} on {values.samples} samples, which cannot be told from .5 after "
                f"{evaluations_at_chance} evaluations; labels and features do not belong together, or the learning "
                "rates (--dense.learning-rate, --tables.learning-rate) are off; --guards.chance-evaluations 0 goes on"
            )
        return None

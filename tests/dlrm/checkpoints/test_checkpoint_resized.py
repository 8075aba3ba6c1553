"""A run whose tables were given another number of rows goes on if it is told to, and else says what would make it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.config import CheckpointConfig, EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.model import DLRM
from dlrm.training.restore import restore_run
from dlrm.training.trainer import Trainer
from embeddings import RowWiseAdagrad, TableConfig
from embeddings.build import build_tables

CONFIG = TrainingConfig(
    epochs=0.2,
    step=StepConfig(global_batch_size=200, device="cpu", threads=1),
    evaluation=EvaluationConfig(every_samples=1200),
    guards=GuardConfig(chance_evaluations=0, constant_prediction=False),
)
KEEP = replace(CONFIG, checkpoint=CheckpointConfig(resized_tables="keep"))


def describe(dataset: Dataset, more_rows: int, dim: int = 4) -> list[TableConfig]:
    return [
        TableConfig(
            name=feature.name,
            num_rows=feature.num_rows + more_rows * (number == 0),
            dim=dim,
            optimizer=RowWiseAdagrad(learning_rate=0.05),
        )
        for number, feature in enumerate(dataset.info.features)
    ]


def trainer(dataset: Dataset, folder: Path, config: TrainingConfig, *, more_rows: int, dim: int = 4) -> Trainer:
    torch.manual_seed(0)
    tables = describe(dataset, more_rows, dim)
    model = DLRM(num_numeric=len(dataset.info.numeric), tables=tables, dim=dim, bottom=(8,), top=(8,), seed=4)
    return Trainer(model, dataset, config, folder)


@pytest.mark.parametrize(("before", "after"), [(0, 5), (9, 2)])
def test_a_run_goes_on_with_a_table_of_another_length(
    before: int, after: int, tmp_path: Path, click_log: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    config = describe(click_log, 0)[0]
    name, rows = config.name, config.num_rows
    first = trainer(click_log, tmp_path, CONFIG, more_rows=before)
    first.fit()
    size = rf"network\.tables\.{name}\.num_rows = {rows + before}, got {rows + after};"
    with pytest.raises(ValueError, match=rf"{size}.*--checkpoint\.resized-tables keep$"):
        trainer(click_log, tmp_path, CONFIG, more_rows=after)
    with pytest.raises(ValueError, match=r"got \[8\]; choose another --output, or repeat that run.s settings"):
        trainer(click_log, tmp_path, KEEP, more_rows=before, dim=8)

    # What is restored: the rows that both have, and those of a new run.
    second = trainer(click_log, tmp_path, replace(KEEP, epochs=0.3), more_rows=after)
    new = next(build_tables([describe(click_log, after)[0]], seed=4).rows()).weight
    old = next(first.model.tables.rows())  # type: ignore[operator, union-attr]
    notes = restore_run(second.checkpoints, second.snapshot, second.config, second.settings, second.folder)
    assert (
        sum(f"table '{name}': {rows + before} rows in the checkpoint, {rows + after} rows now" in n for n in notes) == 1
    )
    resized = next(second.model.tables.rows())  # type: ignore[operator, union-attr]
    kept = min(before, after) + rows
    assert torch.equal(resized.weight[:kept], old.weight[:kept])
    assert torch.equal(resized.weight[kept:], new[kept:])
    assert torch.equal(resized.state["sum_of_squares"][:kept], old.state["sum_of_squares"][:kept])
    assert resized.state["sum_of_squares"][:kept].any()
    assert not resized.state["sum_of_squares"][kept:].any()
    assert second.progress.best is None  # that of other tables is not to be measured with these

    second = trainer(click_log, tmp_path, replace(KEEP, epochs=0.3), more_rows=after)
    assert second.fit()["samples"] == 3600
    assert "rows in the checkpoint" in capsys.readouterr().err
    best = CheckpointStore(tmp_path / "checkpoints").restore_best()
    assert best is not None
    assert best.state["tables"][f"{name}.weight"].shape == (rows + after, 4)
    # From now on it is a run of this size.
    assert trainer(click_log, tmp_path, replace(CONFIG, epochs=0.4), more_rows=after).fit()["samples"] == 4800


def test_a_best_one_of_other_tables_is_not_measured(tmp_path: Path, click_log: Dataset) -> None:
    trainer(click_log, tmp_path, CONFIG, more_rows=0).fit()
    # Stopped before the first evaluation: the last weights are measured.
    config = replace(KEEP, epochs=0.3, time_limit_seconds=1e-9)
    assert trainer(click_log, tmp_path, config, more_rows=3).fit()["best_samples"] == 0

"""What users get wrong: each case ends in one line that says what, where and what to do; what was written stays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from dlrm.analysis.bottleneck import share_out_time
from dlrm.analysis.run_folder import read_run
from dlrm.analysis.verdict import describe_unfinished
from dlrm.batch import Batch
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.cli import main
from dlrm.config import CheckpointConfig, EvaluationConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.distributed.ranks import Ranks
from dlrm.model import DLRM
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.training import guards
from dlrm.training.guards import NonFiniteLossError, check_memory, check_shares
from dlrm.training.trainer import Trainer
from embeddings import RowAdam, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.build import build_tables
from embeddings.row_optimizers import RowOptimizer
from embeddings.tables import RowType

Make = Callable[..., DLRM]
MakeDataset = Callable[..., Dataset]
SMALL = TrainingConfig(step=StepConfig(global_batch_size=100))


def fit(model: nn.Module, dataset: Dataset, folder: Path, config: TrainingConfig = SMALL) -> dict[str, object]:
    return Trainer(model, dataset, config, folder).fit()


def noise(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, rows).astype(np.uint8), rng.integers(0, 10, rows)


def test_an_id_outside_the_table_is_named_by_feature_and_row(
    tmp_path: Path, make_dlrm: Make, make_dataset: MakeDataset
) -> None:
    labels, ids = noise(1000)
    ids[777] = 12
    dataset = make_dataset(labels, ids)
    with pytest.raises(ValueError, match=r"row 777 of split 'train'.*feature 'a'.*\[0, 10\).*got 12"):
        fit(make_dlrm(dataset), dataset, tmp_path / "run")


def test_a_label_that_is_not_0_or_1_is_named_by_row(tmp_path: Path, make_dlrm: Make, make_dataset: MakeDataset) -> None:
    labels, ids = noise(1000)
    labels[321] = 2
    dataset = make_dataset(labels, ids)
    with pytest.raises(ValueError, match=r"row 321 of split 'train': expected a label of 0 or 1, got 2"):
        fit(make_dlrm(dataset), dataset, tmp_path / "run")


def test_an_infinite_number_in_the_data_is_named_by_column_and_row(
    tmp_path: Path, make_dlrm: Make, make_dataset: MakeDataset
) -> None:
    labels, ids = noise(1000)
    numbers = np.zeros(1000)
    numbers[55] = np.inf
    dataset = make_dataset(labels, ids, numbers)
    with pytest.raises(NonFiniteLossError, match="numeric column 'x' of row 55"):
        fit(make_dlrm(dataset), dataset, tmp_path / "run")


def test_a_damaged_row_is_named_by_feature(tmp_path: Path, make_dlrm: Make, make_dataset: MakeDataset) -> None:
    labels, ids = noise(1000)
    ids[:] = 3
    ids[500] = 4
    dataset = make_dataset(labels, ids)
    model = make_dlrm(dataset)
    next(iter(model.tables.rows())).weight[4] = float("nan")
    with pytest.raises(NonFiniteLossError, match="rows of feature 'a' looked up for row 500"):
        fit(model, dataset, tmp_path / "run")


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, make_dlrm: Make, click_log: Dataset
) -> None:
    config = TrainingConfig(
        dense=DenseOptimizerConfig(name="sgd", learning_rate=1e12),
        step=StepConfig(global_batch_size=100),
        checkpoint=CheckpointConfig(every_samples=100),
    )
    with pytest.raises(ValueError, match=r"(checkpoint after [\d,]+ samples is kept|nothing was saved before)"):
        fit(make_dlrm(click_log), click_log, tmp_path / "run", config)
    restored = CheckpointStore(tmp_path / "run" / "checkpoints").restore_latest()
    if restored is not None:
        weights = [*restored.state["dense"].values(), *(part.read() for part in restored.state["tables"].values())]
        assert all(bool(value.isfinite().all()) for value in weights)


class Deaf(nn.Module):
    """Hears nothing: the same logit for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Tensor:
        return self.bias.expand(len(batch))


def test_a_constant_prediction_stops_the_run(tmp_path: Path, click_log: Dataset) -> None:
    with pytest.raises(ValueError, match=r"every one of 4000 predictions is 0\.\d+"):
        fit(Deaf(), click_log, tmp_path / "run")


def test_an_auc_that_stays_at_one_half_stops_the_run(
    tmp_path: Path, make_dlrm: Make, make_dataset: MakeDataset
) -> None:
    labels, ids = noise(4000)
    numbers = np.random.default_rng(1).normal(size=4000)
    dataset = make_dataset(labels, np.full_like(ids, 3), numbers)  # a number that says nothing of the label
    config = TrainingConfig(
        epochs=5, step=StepConfig(global_batch_size=100), evaluation=EvaluationConfig(every_samples=1000)
    )
    with pytest.raises(ValueError, match=r"AUC is 0\.(4|5).* after 3 evaluations.*--guards.chance-evaluations"):
        fit(make_dlrm(dataset), dataset, tmp_path / "run", config)


def test_a_model_that_learns_passes_the_guards(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    config = TrainingConfig(epochs=3, step=StepConfig(global_batch_size=100))
    auc = fit(make_dlrm(click_log), click_log, tmp_path / "run", config)["auc"]
    assert isinstance(auc, float)
    assert auc > 0.6


def test_tables_and_data_must_fit(tmp_path: Path, make_dataset: MakeDataset) -> None:
    dataset = make_dataset(*noise(100))
    for table, message in (
        (TableConfig(name="t", num_rows=5, dim=4, features=("a",)), r"'a'.*up to 9.*num_rows = 5"),
        (TableConfig(name="t", num_rows=50, dim=4, features=("b",)), r"table 't': expected a feature 'b'.*which has a"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(DLRM(num_numeric=1, tables=[table], dim=4), dataset, SMALL, tmp_path / "run")


def test_a_model_for_other_numbers_is_refused(tmp_path: Path, make_dataset: MakeDataset) -> None:
    dataset = make_dataset(*noise(100))
    model = DLRM(num_numeric=4, tables=[TableConfig(name="a", num_rows=10, dim=4)], dim=4)
    with pytest.raises(ValueError, match="expected num_numeric = 1 as in the data, got 4"):
        fit(model, dataset, tmp_path / "run")


def test_logits_of_another_shape_are_refused(tmp_path: Path, click_log: Dataset) -> None:
    class Wrong(Deaf):
        def forward(self, batch: Batch) -> Tensor:
            return self.bias.expand(len(batch), 1)

    with pytest.raises(ValueError, match=r"expected logits of shape \(100,\), got \(100, 1\)"):
        fit(Wrong(), click_log, tmp_path / "run")


def test_what_stopped_a_run_stands_in_its_log_and_report(tmp_path: Path, click_log: Dataset) -> None:
    with pytest.raises(ValueError, match="every one of") as caught:
        fit(Deaf(), click_log, tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.stopped == str(caught.value)
    assert str(caught.value) in (describe_unfinished(run) or "")
    assert dict(share_out_time(run)).keys() >= {"dense forward", "evaluation"}


def test_tables_that_do_not_fit_into_memory_are_named_before_they_are_made() -> None:
    small = TableConfig(name="small", num_rows=10, dim=4)
    check_memory([small])
    with pytest.raises(ValueError, match=r"GB of memory, got 10\d{5}\.\d GB, most of it table 'huge'"):
        check_memory([small, TableConfig(name="huge", num_rows=10**12, dim=128)])


@pytest.mark.parametrize(
    ("optimizer", "row_type", "needed"),
    [
        (RowWiseAdagrad(learning_rate=0.1), "fp32", 2 * 1000 * (8 + 1) * 4),
        (RowAdam(learning_rate=0.1), "fp32", 2 * (1000 * 3 * 8 * 4 + 8)),
        (RowSGD(learning_rate=0.1), "bf16", 2 * (1000 * 8 * 2 + 8)),
    ],
)
def test_memory_is_that_of_rows_and_of_their_optimizers_state(
    monkeypatch: pytest.MonkeyPatch, optimizer: RowOptimizer, row_type: RowType, needed: int
) -> None:
    table = TableConfig(name="t", num_rows=1000, dim=8, optimizer=optimizer, row_type=row_type)
    monkeypatch.setattr(guards, "memory_bytes", lambda: needed)
    check_memory([table])
    monkeypatch.setattr(guards, "memory_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match="most of it table 't'"):
        check_memory([table])


class Two(Ranks):
    """Two ranks, of which the other one holds as much as `times` says."""

    times = 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return [number * (1 + self.times) for number in numbers]


def test_two_sets_of_tables_may_share_a_tables_name() -> None:
    sets = [build_tables([TableConfig(name="t", num_rows=rows, dim=4)]) for rows in (10, 20)]
    ranks = Two(rank=0, count=2)
    check_shares(nn.ModuleList(sets), ranks)
    Two.times = 1
    with pytest.raises(ValueError, match=r"table 't': expected 2 ranks to hold its 10 rows once, got 20 rows"):
        check_shares(nn.ModuleList(sets), ranks)


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, click_log: Dataset, make_dlrm: Make) -> None:
    trainer = Trainer(make_dlrm(click_log), click_log, SMALL, tmp_path / "run")
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match=r"another process is training in .*run"):
        trainer.fit()
    assert trainer.fit()["samples"] == 12_000


def test_an_unknown_segment_column_is_named_before_training(tmp_path: Path, click_log: Dataset) -> None:
    config = replace(SMALL, evaluation=EvaluationConfig(segment_by="nobody"))
    with pytest.raises(ValueError, match=r"--evaluation.segment-by: .*'nobody'; columns: "):
        Trainer(Deaf(), click_log, config, tmp_path / "run")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (data / "dataset.json").unlink(), "found no dataset.json"),
        (lambda data: (data / "dataset.json").write_text("{"), "is damaged"),
        (
            lambda data: (data / "dataset.json").write_text('{"format_version": 99}'),
            "expected format version 1, got 99",
        ),
        (lambda data: (data / "train" / "part-00000.arrow").write_bytes(b"ARROW1"), "part-00000.arrow cannot be read"),
        (lambda data: (data / "train" / "part-00000.arrow").unlink(), "part-00000.arrow cannot be read"),
    ],
)
def test_a_damaged_dataset_is_one_line(
    tmp_path: Path, make_dataset: MakeDataset, damage: Callable[[Path], object], message: str
) -> None:
    data = make_dataset(*noise(100)).folder
    damage(data)
    with pytest.raises(ValueError, match=message) as caught:
        Dataset(data).part("train", 0)
    assert "\n" not in str(caught.value)


def test_verify_finds_a_flipped_bit(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(*noise(100))
    dataset.verify()
    path = dataset.folder / "valid" / "part-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"valid/part-00000.arrow is not what `prepare` wrote"):
        dataset.verify()


def test_an_empty_split_is_one_line(tmp_path: Path, make_dlrm: Make, make_dataset: MakeDataset) -> None:
    folder = make_dataset(*noise(100)).folder
    content = json.loads((folder / "dataset.json").read_text())
    content["splits"]["train"] = []
    (folder / "dataset.json").write_text(json.dumps(content))
    dataset = Dataset(folder)
    with pytest.raises(ValueError, match="expected rows in the split 'train'"):
        fit(make_dlrm(dataset), dataset, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no-such-recipe"], "expected a recipe (synthetic, large-batch, criteo-kaggle"),
        (["train", "criteo-kaggle"], "--data: expected the files of recipe 'criteo-kaggle'"),
        (
            ["train", "synthetic", "--step.global-batch-size", "0"],
            "--step.global-batch-size: expected at least 1, got 0",
        ),
        (["train", "synthetic", "--dense.learning-rate", "-1"], "--dense.learning-rate"),
        (["train", "synthetic", "--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["train", "synthetic", "--nobody", "1"], "error: Unrecognized options: --nobody"),
        (["train", "synthetic", "--data", "nowhere"], "--data: expected a prepared dataset, got nowhere"),
    ],
)
def test_the_command_line_says_one_line_and_fails(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("recforge: ") for line in lines)
    assert [line for line in lines if "error" in line] == lines[-1:]
    assert message in lines[-1]

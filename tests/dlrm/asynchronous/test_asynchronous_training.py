"""Trainers around shards train each sample once, learn what one process would, and leave a run like any other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm.analysis.report import run_report
from dlrm.asynchronous.config import AsynchronousConfig, ServersConfig
from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.asynchronous.train import describe_asynchronous, train_with
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.pieces import as_parts
from dlrm.config import EvaluationConfig, ModelConfig, NoiseScaleConfig, StepConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.descriptions import describe_tables
from dlrm.training.command import build_trainer
from dlrm.training.restore import CHECKPOINTS
from dlrm.training.run_log import read_records
from parameter_server.processes.local_run import LocalRun

ROWS = 6_000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    log = SyntheticConfig(num_train=ROWS, num_valid=1_000, num_test=1_000)
    return generate(log, tmp_path_factory.mktemp("log") / "data", threads=1)


def configure(output: Path, **servers: Any) -> AsynchronousConfig:
    return AsynchronousConfig(
        output=output,
        model=ModelConfig(dim=8, bottom=(16,), top=(16,)),
        step=StepConfig(global_batch_size=128, threads=1),
        evaluation=EvaluationConfig(test_best=False),
        noise_scale=NoiseScaleConfig(every_steps=0),
        servers=ServersConfig(durability="none", chunk_batches=4, **servers),
    )


def run_trainers(config: AsynchronousConfig, dataset: Dataset, trainers: int) -> list[dict[str, Any]]:
    tables = describe_tables(dataset.info, config.model.dim, config.tables, config.small_tables)
    with (
        LocalRun(describe_asynchronous(config, dataset, tables), shards=2) as run,
        ThreadPoolExecutor(trainers) as pool,
    ):

        def train(number: int) -> dict[str, Any]:
            own = replace(config, servers=replace(config.servers, name=f"trainer-{number}"))
            return train_with(run.client, run.connect, "test", own, dataset, tables)

        return list(pool.map(train, range(trainers)))


def test_one_trainer_in_lock_step_trains_what_one_process_does(dataset: Dataset, tmp_path: Path) -> None:
    config = configure(tmp_path / "servers", staleness=0)
    config = replace(config, dense_average=DenseAverageConfig(background=False))
    (summary,) = run_trainers(config, dataset, 1)
    alone = build_trainer("test", config, tmp_path / "alone", dataset).fit()
    assert summary["samples"] == alone["samples"] == ROWS
    assert summary["logloss"] == pytest.approx(alone["logloss"], abs=1e-6)
    assert summary["auc"] == pytest.approx(alone["auc"], abs=1e-6)


def load_tensors(run: Path) -> dict[str, torch.Tensor]:
    restored = CheckpointStore(run / CHECKPOINTS).restore_latest()
    assert restored is not None
    tables = {name: tensor.read() for name, tensor in as_parts(restored.state["tables"]).items()}
    return tables | dict(restored.state["dense"])


@pytest.mark.parametrize("staleness", [None, 2])
def test_trainers_share_the_samples_and_leave_a_run_like_any_other(
    dataset: Dataset, tmp_path: Path, staleness: int | None
) -> None:
    config = configure(tmp_path / "servers", staleness=staleness)
    summaries = run_trainers(config, dataset, 3)
    whole = [summary for summary in summaries if "auc" in summary]
    assert len(whole) == 1
    assert whole[0]["samples"] == ROWS
    assert whole[0]["auc"] > 0.55
    records = list(read_records(tmp_path / "servers"))
    assert {record["kind"] for record in records} >= {"valid", "test"}
    page = tmp_path / "page.html"
    assert run_report([str(tmp_path / "servers"), "--output", str(page)]) == 0
    assert "AUC" in page.read_text(encoding="utf-8")


def test_a_run_goes_on_in_the_other_mode(dataset: Dataset, tmp_path: Path) -> None:
    config = configure(tmp_path / "first", staleness=0)
    config = replace(config, dense_average=DenseAverageConfig(mode="average", background=False, every_steps=1))
    alone = build_trainer("test", replace(config, epochs=2.0), tmp_path / "alone", dataset)
    alone.fit()
    build_trainer("test", config, tmp_path / "first", dataset).fit()
    second = replace(config, epochs=2.0, output=tmp_path / "second", branch_from=tmp_path / "first")
    (summary,) = run_trainers(second, dataset, 1)
    assert summary["samples"] == 2 * ROWS
    expected, found = load_tensors(tmp_path / "alone"), load_tensors(tmp_path / "second")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)

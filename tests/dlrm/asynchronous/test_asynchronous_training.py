"""Several trainers around shards train each sample once, learn what one process would, and leave a run like any other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm.asynchronous.config import AsynchronousConfig, ServersConfig
from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.asynchronous.train import describe_asynchronous, train_with
from dlrm.config import EvaluationConfig, ModelConfig, NoiseScaleConfig, StepConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.descriptions import describe_tables
from dlrm.training.command import build_trainer
from parameter_server.local_run import LocalRun

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
    with LocalRun(describe_asynchronous(config, dataset, tables), shards=2) as run, ThreadPoolExecutor(trainers) as pool:

        def train(number: int) -> dict[str, Any]:
            own = replace(config, servers=replace(config.servers, name=f"trainer-{number}"))
            return train_with(run.client, run.connect, "test", own, dataset, tables)

        return list(pool.map(train, range(trainers)))


def test_one_trainer_in_lock_step_trains_what_one_process_does(dataset: Dataset, tmp_path: Path) -> None:
    config = configure(tmp_path / "servers", staleness=0)
    config = replace(config, dense_average=DenseAverageConfig(mode="average", background=False))
    (summary,) = run_trainers(config, dataset, 1)
    alone = build_trainer("test", config, tmp_path / "alone", dataset).fit()
    assert summary["samples"] == alone["samples"] == ROWS
    assert summary["logloss"] == pytest.approx(alone["logloss"], abs=1e-6)
    assert summary["auc"] == pytest.approx(alone["auc"], abs=1e-6)

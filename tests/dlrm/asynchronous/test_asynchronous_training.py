"""Trainers around shards train each sample once, learn what one process would, and leave a run like any other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from math import inf
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from dlrm.analysis.report import run_report
from dlrm.asynchronous import train as train_module
from dlrm.asynchronous.config import AsynchronousConfig, ServersConfig
from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.asynchronous.membership import LeaseLostError, Membership
from dlrm.asynchronous.served_clicks import SERVED_CLICKS
from dlrm.asynchronous.train import describe_asynchronous, train, train_with
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.pieces import as_parts
from dlrm.config import EvaluationConfig, ModelConfig, NoiseScaleConfig, RunConfig, StepConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.descriptions import describe_tables
from dlrm.distributed.place import Place
from dlrm.recipes import Recipe
from dlrm.tables_config import TablesConfig
from dlrm.training.command import build_trainer, rate_by_frequency, scale_to_batch
from dlrm.training.course import Course
from dlrm.training.restore import CHECKPOINTS
from dlrm.training.run_log import read_records
from dlrm.training.summary import SUMMARY
from dlrm.training.trainer import Trainer
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.errors import Refusal, RefusedError
from parameter_server.processes.local_run import LocalRun
from parameter_server.shard.shard import Shard

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


def run_trainers(
    config: AsynchronousConfig, dataset: Dataset, trainers: int, folder: Path | None = None
) -> list[dict[str, Any]]:
    """Trains; shards' files, if any, are below a folder."""
    tables = describe_tables(dataset.info, config.model.dim, config.tables, config.small_tables)
    with (
        LocalRun(describe_asynchronous(config, dataset, tables), shards=2, folder=folder) as run,
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


def test_a_run_that_ends_early_tells_what_it_has_trained(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Course, "time_is_up", lambda course: course.progress.samples > 2_600)
    config = replace(configure(tmp_path / "servers"), time_limit_seconds=1.0)
    (summary,) = run_trainers(config, dataset, 1)
    assert summary["stopped"] == "time limit of 1.0 seconds"
    assert summary["samples"] == 5 * 4 * 128  # in whole chunks
    assert [info.samples for info in CheckpointStore(tmp_path / "servers" / CHECKPOINTS).list()] == [2_560]


@pytest.mark.parametrize("pushes", [Shard.push, Shard.push_pull_dense])
def test_a_trainer_whose_lane_others_have_may_start_again(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pushes: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise RefusedError(Refusal.FAILED_PRECONDITION, "lane 0: expected lease 2 or a later one, got 1")

    monkeypatch.setattr(Shard, pushes.__name__, refuse)
    with pytest.raises(LeaseLostError, match=r"expected lease 2 or a later one, got 1; nothing is lost: start this"):
        run_trainers(configure(tmp_path), dataset, 1)


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


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_killed_trainer_takes_no_summary_with_it_and_a_living_one_is_left_to_write_it(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_killed: bool
) -> None:
    config = configure(tmp_path / "servers")
    tables = describe_tables(dataset.info, config.model.dim, config.tables, config.small_tables)
    with LocalRun(describe_asynchronous(config, dataset, tables), shards=2) as run:
        register, look, looks = run.client.register, Membership.is_oldest, []
        older = register("trainer", "older", "", run.description.to_json()).member
        monkeypatch.setattr(run.client, "register", lambda *of: register(*of)._replace(lease_seconds=0.5))

        def look_and_end_a_lease(membership: Membership) -> bool:
            looks.append(look(membership))
            if is_killed and len(looks) == 1:  # the first look still finds it living
                run.coordinator.members.require(older).heard = -inf
            return looks[-1]

        monkeypatch.setattr(Membership, "is_oldest", look_and_end_a_lease)
        own = train_with(run.client, run.connect, "test", config, dataset, tables)
    assert looks[0] is False
    assert ("auc" in own) is is_killed
    assert (tmp_path / "servers" / SUMMARY).is_file() is is_killed


def alone(config: AsynchronousConfig, output: Path, dataset: Dataset, **changed: Any) -> Trainer:
    """A trainer of the same settings, but for those that are about servers."""
    settings = {item.name: getattr(config, item.name) for item in fields(RunConfig)}
    return build_trainer("test", RunConfig(**settings | {"branch_from": None, **changed}), output, dataset)


def test_a_run_goes_on_in_the_other_mode_and_back(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(configure(tmp_path / "second", staleness=0), epochs=2.0, branch_from=tmp_path / "first")
    config = replace(config, dense_average=DenseAverageConfig(mode="average", background=False, every_steps=1))
    config = replace(config, servers=replace(config.servers, durability="snapshot"), noise_scale=NoiseScaleConfig())
    alone(config, tmp_path / "alone", dataset).fit()
    alone(config, tmp_path / "first", dataset, epochs=1.0).fit()
    saved, begin = [], Coordinator.begin_snapshot
    monkeypatch.setattr(
        Coordinator, "begin_snapshot", lambda run, name: (saved.append(run.status().has_begun), begin(run, name))
    )
    (summary,) = run_trainers(config, dataset, 1, tmp_path / "shards")
    assert saved[0] is False  # what was loaded is kept before any of it changes
    assert summary["samples"] == 2 * ROWS
    expected, found = load_tensors(tmp_path / "alone"), load_tensors(tmp_path / "second")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    other = {"branch_from": config.branch_from, "step": replace(config.step, threads=2)}
    longer = alone(config, tmp_path / "second", dataset, epochs=2.1, **other)
    assert longer.fit()["samples"] == round(2.1 * ROWS)


def test_numbers_are_scaled_as_one_process_scales_them(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(configure(tmp_path, coordinator="localhost:1"), data=dataset.folder, scale_from=16, rule="auto")
    config = replace(config, tables=TablesConfig(optimizer="adam"))  # whose rule depends on how often rows are named
    given: list[Any] = []
    monkeypatch.setattr(train_module, "train_with", lambda *told: given.append(told[3]) or {})
    train("test", Recipe(help="", config=config, source=cast(Any, None)), config)
    expected = rate_by_frequency(scale_to_batch(config, Place()), dataset, Place())
    assert given == [expected]
    assert expected.tables.rates
    assert expected.dense != config.dense


def test_the_dense_part_is_compiled_if_that_is_asked_for(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[nn.Module, str]] = []
    monkeypatch.setattr(
        "dlrm.training.train_step.compile_dense", lambda model, device: compiled.append((model, device.type))
    )
    config = configure(tmp_path)
    tables = cast(Any, None)
    monkeypatch.setattr("dlrm.model.build_dlrm", lambda *_, **__: nn.Linear(1, 1))
    SERVED_CLICKS.build(config, dataset, tables)
    assert not compiled
    model = SERVED_CLICKS.build(replace(config, step=replace(config.step, compile=True)), dataset, tables)
    assert compiled == [(model, "cpu")]

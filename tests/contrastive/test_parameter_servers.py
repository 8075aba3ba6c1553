"""Recommenders of sequences around parameter servers learn what one process learns, and each sample once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contrastive.asynchronous import SERVED_SEQUENCES, ServedSequenceConfig, run_ps
from contrastive.build import build_model
from contrastive.config import RankingEvaluationConfig, SequenceConfig, SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem
from contrastive.next_item_task import NextItemTask
from contrastive.recommender import Recommender
from deploy.cli import main
from dlrm.asynchronous import up
from dlrm.asynchronous.config import ServersConfig
from dlrm.asynchronous.crew import Role
from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.asynchronous.train import describe_asynchronous, train_with
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.pieces import as_parts
from dlrm.config import StepConfig
from dlrm.training.restore import CHECKPOINTS
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer
from parameter_server.processes.local_run import LocalRun

BATCH = 64
STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    config = SyntheticSequencesConfig(num_users=300, num_items=60, num_tastes=4, mean_actions=8.0, most_actions=20)
    return generate_sequences(config, tmp_path_factory.mktemp("sequences") / "data")


def configure(output: Path, world: SequenceDataset, **changed: Any) -> ServedSequenceConfig:
    """A run of 20 steps, of which the last one ends in the middle of an epoch."""
    given: dict[str, Any] = {
        "epochs": STEPS * BATCH / world.rows("train"),
        "dim": 16,
        "encoder": EncoderConfig(inner=32, dropout=0.0, attention_dropout=0.0),
        "mclrec": MclrecConfig(augmenter_widths=(8,), form="two_step"),
        "step": StepConfig(global_batch_size=BATCH, threads=1),
        "evaluation": RankingEvaluationConfig(batch_size=64, patience=None, test_best=False),
        "servers": ServersConfig(durability="none", chunk_batches=4, staleness=0),
        "dense_average": DenseAverageConfig(background=False),
    }
    return ServedSequenceConfig(output=output, **given | changed)


def run_trainers(config: ServedSequenceConfig, world: SequenceDataset, trainers: int = 1) -> list[dict[str, Any]]:
    tables = SERVED_SEQUENCES.describe_tables(config, world)
    with (
        LocalRun(describe_asynchronous(config, world, tables), shards=2) as run,
        ThreadPoolExecutor(trainers) as pool,
    ):
        return list(pool.map(lambda number: train(run, number, config, world), range(trainers)))


def train(run: LocalRun, number: int, config: ServedSequenceConfig, world: SequenceDataset) -> dict[str, Any]:
    own = replace(config, servers=replace(config.servers, name=f"trainer-{number}"))
    tables = SERVED_SEQUENCES.describe_tables(config, world)
    return train_with(run.client, run.connect, "test", own, world, tables, SERVED_SEQUENCES)


def alone(config: ServedSequenceConfig, output: Path, world: SequenceDataset, **changed: Any) -> Trainer:
    """A trainer of the same settings without servers."""
    settings = {item.name: getattr(config, item.name) for item in fields(SequenceRunConfig)}
    own = SequenceRunConfig(**settings | {"output": output, **changed})
    return Trainer(build_model(own, world), NextItem(world, own), own, output, recipe="test")


def load_tensors(run: Path) -> dict[str, torch.Tensor]:
    restored = CheckpointStore(run / CHECKPOINTS).restore_latest()
    assert restored is not None
    tables = {name: tensor.read() for name, tensor in as_parts(restored.state["tables"]).items()}
    return tables | dict(restored.state["dense"])


@pytest.mark.parametrize(
    "changed",
    [
        {"mclrec": MclrecConfig(augmenter_widths=(8,), form="two_step")},
        {"mclrec": MclrecConfig(augmenter_widths=(8,), form="three_step", views_weight=0.1)},
        {"mclrec": MclrecConfig(augmenter_widths=(8,), form="joint"), "sequence": SequenceConfig(negatives=20)},
        {"mclrec": MclrecConfig(contrast="none")},
    ],
    ids=lambda changed: changed["mclrec"].form if changed["mclrec"].needs_views else "sasrec",
)
def test_one_trainer_in_lock_step_trains_what_one_process_does(
    world: SequenceDataset, tmp_path: Path, changed: dict[str, Any]
) -> None:
    config = configure(tmp_path / "servers", world, **changed)
    (summary,) = run_trainers(config, world)
    expected = alone(config, tmp_path / "alone", world).fit()
    assert summary["samples"] == expected["samples"] == STEPS * BATCH
    assert summary["ranked"] == pytest.approx(expected["ranked"], abs=1e-6)
    found, wanted = load_tensors(tmp_path / "servers"), load_tensors(tmp_path / "alone")
    assert found.keys() == wanted.keys()
    started = alone(config, tmp_path / "new", world)
    weights = {name: tensor for name, tensor in started.model.state_dict().items() if name in found}
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
        if name in weights and tensor.is_floating_point():
            assert not torch.equal(tensor, weights[name]), name


def test_trainers_that_do_not_wait_leave_a_run_that_goes_on_in_one_process(
    world: SequenceDataset, tmp_path: Path
) -> None:
    config = configure(
        tmp_path / "run",
        world,
        epochs=1.0,
        step=StepConfig(global_batch_size=2 * BATCH, threads=1),
        mclrec=MclrecConfig(augmenter_widths=(8,)),
        tables=replace(SequenceRunConfig().tables, learning_rate=5e-3),
        servers=ServersConfig(durability="none", chunk_batches=4, trainers=2),
        dense_average=DenseAverageConfig(),
    )
    (summary,) = [each for each in run_trainers(config, world, 2) if "recall_10" in each]
    assert summary["samples"] == world.rows("train")
    targets = torch.from_numpy(world.targets("test", np.arange(world.rows("test"))))
    most_popular = torch.from_numpy(world.item_counts.copy()).topk(10).indices
    assert summary["recall_10"] > torch.isin(targets, most_popular).double().mean().item() + 0.05
    assert {record["kind"] for record in read_records(tmp_path / "run")} == {"train", "valid", "test"}
    assert {"config.json", "tables.json", "embedding_space.json"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    further = alone(config, tmp_path / "run", world, epochs=1.5).fit()
    assert further["samples"] == round(1.5 * world.rows("train"))
    assert further["recall_10"] > summary["recall_10"] - 0.1  # from its weights, not from the start
    assert len(Recommender(tmp_path / "run").recommend(["user-0"], 3)[0]) == 3


def test_a_trainer_that_dies_between_two_passes_has_its_batches_done_once(
    world: SequenceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(
        tmp_path,
        world,
        mclrec=MclrecConfig(augmenter_widths=(8,)),
        servers=ServersConfig(durability="none", chunk_batches=4),
    )
    entered: list[str] = []
    enter = NextItemTask.enter

    def die(task: NextItemTask, name: str) -> None:
        enter(task, name)
        entered.append(name)
        if entered.count("augmenters") == 7:  # of the third batch of the second chunk, whose first push has left
            task.model.items.drain()
            raise InterruptedError("killed")

    tables = SERVED_SEQUENCES.describe_tables(config, world)
    with LocalRun(describe_asynchronous(config, world, tables), shards=2) as run:
        monkeypatch.setattr(NextItemTask, "enter", die)
        monkeypatch.setattr(run.client, "leave", lambda *_: None)
        with pytest.raises(InterruptedError):
            train(run, 0, config, world)
        monkeypatch.undo()
        for member in run.client.status().members:
            if member.role == "trainer":
                run.coordinator.members.require(member.member).heard = -inf
        summary = train(run, 1, config, world)
        counts = [shard.counts for shard in run.shards]
    rows = world.num_items + 1 + len(np.unique(world.sides["taste"].values))
    assert summary["samples"] == STEPS * BATCH
    assert sum(count.skipped_rows for count in counts) == 5 * rows  # of two batches and a half
    assert sum(count.pushed_rows for count in counts) == 2 * STEPS * rows
    assert load_tensors(tmp_path)["item.updates"].item() == 2 * STEPS


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"mclrec": MclrecConfig(contrast="memory", views_weight=0.1)},
            r"^--mclrec\.contrast memory: expected another",
        ),
        (
            {"mclrec": MclrecConfig(), "dense_average": DenseAverageConfig(mode="adam")},
            r"^--dense-average\.mode adam: expected easgd or average beside --mclrec\.form three_step",
        ),
        ({"evaluation": RankingEvaluationConfig(patience=3)}, r"^--evaluation\.patience: expected none"),
    ],
)
def test_what_trainers_by_themselves_cannot_do_is_refused(
    world: SequenceDataset, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SERVED_SEQUENCES.check(configure(tmp_path, world, **changed))


def test_recipes_of_both_kinds_are_started_by_name(
    world: SequenceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Role] = []
    monkeypatch.setattr(up, "watch", lambda roles, *_: started.extend(roles))
    assert main(["ps", "up", "sasrec", "--data", str(world.folder), "--output", str(tmp_path / "run")]) == 0
    assert "recforge: all of 100 epochs are trained (--epochs)" in capsys.readouterr().err
    assert [role.program[:5] for role in started if role.ends_by_itself] == [
        ("-m", "contrastive", "ps", "trainer", "sasrec")
    ] * 2
    assert main(["ps", "trainer", "--help"]) == 0
    told = capsys.readouterr().out
    assert "  criteo-kaggle " in told
    assert "  mclrec-beauty " in told


def test_trainers_of_both_kinds_know_their_flags(world: SequenceDataset, tmp_path: Path) -> None:
    flags = ["--data", str(world.folder), "--output", str(tmp_path), "--servers.coordinator", "nowhere"]
    with pytest.raises(ValueError, match=r"^--servers\.coordinator: expected HOST:PORT"):
        run_ps(["trainer", "mclrec", *flags, "--mclrec.form", "joint"])
    with pytest.raises(ValueError, match=r"^--servers\.coordinator: expected HOST:PORT"):
        run_ps(["trainer", "synthetic", *flags, "--model.dim", "8"])

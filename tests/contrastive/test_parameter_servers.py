"""Recommenders of sequences around parameter servers learn what one process learns, and each sample once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contrastive.asynchronous import SERVED_SEQUENCES, ServedSequenceConfig
from contrastive.build import build_model
from contrastive.config import RankingEvaluationConfig, SequenceConfig, SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem
from dlrm.asynchronous.config import ServersConfig
from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.asynchronous.train import describe_asynchronous, train_with
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.pieces import as_parts
from dlrm.config import StepConfig
from dlrm.training.restore import CHECKPOINTS
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

        def train(number: int) -> dict[str, Any]:
            own = replace(config, servers=replace(config.servers, name=f"trainer-{number}"))
            return train_with(run.client, run.connect, "test", own, world, tables, SERVED_SEQUENCES)

        return list(pool.map(train, range(trainers)))


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

"""Optimizers, schedules, larger batches and early stopping of sequences: a batch counts once, whatever its passes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from contrastive.build import build_model, place_tables
from contrastive.command import SEQUENCES_RUNS
from contrastive.config import RankingEvaluationConfig, SequenceConfig, SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from contrastive.next_item import NextItem
from dlrm.analysis.bottleneck import _ADVICE, describe_bottleneck
from dlrm.config import GuardConfig, ParallelConfig, StepConfig
from dlrm.distributed.place import Place
from dlrm.distributed.ranks import Ranks
from dlrm.noise.config import NoiseScaleConfig
from dlrm.optim.config import DenseOptimizerConfig, HeadConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.plateau import PlateauConfig
from dlrm.tables_config import TablesConfig
from dlrm.training.adversarial_config import AdversarialConfig
from dlrm.training.batch_growth_config import BatchGrowthConfig
from dlrm.training.course import Course
from dlrm.training.guards import find_tables
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

SMALL = SequenceRunConfig(
    epochs=2,
    dim=8,
    log_every_samples=1,
    encoder=EncoderConfig(layers=1, inner=16, dropout=0.1, attention_dropout=0.1),
    mclrec=MclrecConfig(augmenter_widths=(8,)),
    step=StepConfig(global_batch_size=64, threads=1, device="cpu"),
    guards=GuardConfig(chance_evaluations=0),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    config = SyntheticSequencesConfig(num_users=80, num_items=60, num_tastes=4, mean_actions=6.0, most_actions=20)
    return generate_sequences(config, tmp_path_factory.mktemp("sequences") / "data")


def make_trainer(world: SequenceDataset, config: SequenceRunConfig, output: Path) -> Trainer:
    return Trainer(build_model(config, world), NextItem(world, config), config, output)


def train_records(output: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(output) if record["kind"] == "train"]


def test_a_batch_counts_once_though_the_encoder_learns_twice_from_it(world: SequenceDataset, tmp_path: Path) -> None:
    trainer = make_trainer(world, SMALL, tmp_path / "run")
    summary = trainer.fit()
    batches = 2 * math.ceil(world.rows("train") / 64)
    assert summary["samples"] == 2 * world.rows("train")
    assert len(train_records(tmp_path / "run")) == batches
    of_augmenters = {id(weight) for weight in trainer.model.augmenters.parameters()}
    steps = {id(weight) in of_augmenters: float(kept["step"]) for weight, kept in trainer.optimizer.state.items()}
    assert steps == {False: 2 * batches, True: batches}
    (items,) = (rows for rows in find_tables(trainer.model)[0].rows())
    assert int(items.state["updates"]) == 2 * batches


def test_lamb_of_weights_and_rows_follows_its_schedules_batch_by_batch(world: SequenceDataset, tmp_path: Path) -> None:
    config = replace(
        SMALL,
        dense=DenseOptimizerConfig(name="lamb", learning_rate=0.01),
        tables=TablesConfig(optimizer="lamb", learning_rate=0.01, init_scale=0.1),
        dense_schedule=Schedule(warmup_samples=100, decay_samples=300),
        tables_schedule=Schedule(warmup_samples=200),
    )
    make_trainer(world, config, tmp_path / "run").fit()
    records = train_records(tmp_path / "run")
    starts = [0, *(record["samples"] for record in records[:-1])]
    for start, record in zip(starts, records, strict=True):
        middle = (start + record["samples"]) / 2
        assert record["dense_learning_rate"] == pytest.approx(0.01 * config.dense_schedule.factor(middle))
        assert record["tables_learning_rate_factor"] == pytest.approx(config.tables_schedule.factor(middle))
    assert records[-1]["loss"] < records[0]["loss"]


def test_batches_grow_in_stages_and_a_plateau_lowers_rates(world: SequenceDataset, tmp_path: Path) -> None:
    config = replace(
        SMALL,
        epochs=3,
        growth=BatchGrowthConfig(stages=("100=128",)),
        plateau=PlateauConfig(policy="reduce", patience=1, factor=0.5, least_gain=10.0),
    )
    make_trainer(world, config, tmp_path / "run").fit()
    records = train_records(tmp_path / "run")
    assert [record["batch_size"] for record in records[:3]] == [64, 64, 128]
    assert records[-1]["plateau_factor"] == 0.5
    drawn = replace(config, sequence=SequenceConfig(negatives=10))
    with pytest.raises(ValueError, match=r"got one of sequences; add --growth.no-rescale-states$"):
        make_trainer(world, drawn, tmp_path / "drawn")
    make_trainer(world, replace(drawn, growth=replace(drawn.growth, rescale_states=False)), tmp_path / "kept")


def test_numbers_scale_with_the_batch() -> None:
    config = replace(SMALL, scale_from=256, rule="auto", step=replace(SMALL.step, global_batch_size=1024))
    scaled = SEQUENCES_RUNS.scale(config, Place())
    assert scaled.dense.learning_rate == 2 * config.dense.learning_rate
    assert scaled.tables.learning_rate == 2 * config.tables.learning_rate  # each batch looks all rows up
    drawn = SEQUENCES_RUNS.scale(replace(config, sequence=SequenceConfig(negatives=10)), Place())
    assert (drawn.tables.learning_rate, drawn.tables.eps) == (config.tables.learning_rate, 1e-8 / 4)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"noise_scale": NoiseScaleConfig(every_steps=4)}, "--noise-scale.every-steps"),
        ({"growth": BatchGrowthConfig(test="norm")}, "--growth.test norm"),
        ({"rule": "adascale", "scale_from": 32}, "--rule adascale"),
        ({"adversarial": AdversarialConfig(eps=0.1)}, "--adversarial"),
        ({"head": HeadConfig(learning_rate=0.1)}, "--head"),
        ({"evaluation": RankingEvaluationConfig(segment_by="taste")}, "--evaluation.segment-by"),
    ],
)
def test_what_only_clicks_know_is_refused_by_its_flag(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{flag}: expected nothing beside a recipe for sequences, as .*; leave it out"
    ):
        replace(SMALL, **settings)


def test_a_report_advises_flags_that_sequences_have() -> None:
    for stage in _ADVICE:
        advice = describe_bottleneck([(stage, 60.0)], of_sequences=True)
        assert "--step.compile" not in advice
        for flag in re.findall(r"--([a-z][a-z.-]+[a-z])", advice):
            attrgetter(flag.replace("-", "_"))(SMALL)


def test_a_patience_of_ten_stops_at_the_eleventh_evaluation_without_gain() -> None:
    course = Course(SMALL, 100)
    assert SMALL.evaluation.patience == 10
    values = torch.nn.Module()
    for evaluation, metric in enumerate([0.2, *[0.2, 0.1] * 5, 0.2]):
        assert course.reason_to_stop(time_is_up=False) is None
        course.advance(100 * (evaluation + 1), 100, 1.0)
        values.mrr_10 = metric
        course.note_evaluation(values, at_chance=False)  # type: ignore[arg-type]
    assert course.reason_to_stop(time_is_up=False) == "no better mrr_10 in 11 evaluations"


def test_tables_lie_over_ranks_as_flags_say(world: SequenceDataset) -> None:
    ranks = Ranks(rank=1, count=3)

    def kinds(**settings: Any) -> list[str]:
        plan = place_tables(replace(SMALL, parallel=ParallelConfig(**settings)), world, ranks)
        return [table.sharding for table in plan.tables]

    assert kinds() == ["replicated", "replicated"]
    assert kinds(replicate_below_rows=20) == ["row_wise", "replicated"]
    assert kinds(sharding="row_wise", tables=("taste=table_wise",)) == ["row_wise", "table_wise"]
    with pytest.raises(ValueError, match=r"^--parallel.sharding: expected auto, .* for table 'item' .*, got grid$"):
        kinds(sharding="grid")
    with pytest.raises(ValueError, match=r"^--parallel.tables: expected one of the tables .*, got 'items'$"):
        kinds(tables=("items=row_wise",))

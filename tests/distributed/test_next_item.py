"""Sequences over ranks are sequences in one process: losses, rows, encoder, augmenters, memory, metrics."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from contrastive.build import build_model, place_tables
from contrastive.config import RankingEvaluationConfig, SequenceConfig, SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from contrastive.mclrec_losses import HiddenStates, StageLoss
from contrastive.next_item import NextItem
from contrastive.next_item_task import NextItemTask
from contrastive.sequence_batch import SequenceBatch
from dlrm.config import GuardConfig, ParallelConfig, StepConfig
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.tables_config import TablesConfig
from dlrm.training.guards import find_tables
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

# 261 samples: the last batch of an epoch, of 1 or of 2 samples, leaves one rank of 2 or of 3 without any.
BATCHES = {2: 52, 3: 37}
CONFIG = SequenceRunConfig(
    epochs=2,
    seed=3,
    dim=16,
    log_every_samples=1,
    encoder=EncoderConfig(layers=1, inner=32, dropout=0.0, attention_dropout=0.0),
    # Gradients that are 0 but for rounding, as those of the keys' biases, must not decide steps by their signs.
    dense=DenseOptimizerConfig(name="adam", learning_rate=3e-3, eps=1e-3),
    tables=TablesConfig(optimizer="adam", learning_rate=3e-3, eps=1e-3, init_scale=0.1),
    step=StepConfig(global_batch_size=52, threads=1, device="cpu"),
    evaluation=RankingEvaluationConfig(batch_size=37),
    guards=GuardConfig(chance_evaluations=0),
)
THREE_STEP = MclrecConfig(augmenter_widths=(8,), views_weight=0.1, beta=0.2)
FORMS = {
    "sasrec": MclrecConfig(contrast="none"),
    "three_step": THREE_STEP,
    "two_step": replace(THREE_STEP, form="two_step", regulariser="paper"),
    "joint": replace(THREE_STEP, form="joint", similarity="cosine", temperature=0.5),
    "memory": MclrecConfig(contrast="memory", views_weight=0.2, memory_size=150),
}
# Of each case: what is contrasted, how many items are drawn for the softmax, whether rows are cut over the ranks.
CASES = {
    "three steps, cut and drawn": ("three_step", 12, True),
    "memory, copied": ("memory", None, False),
    "three steps, copied": ("three_step", None, False),
    "three steps, cut": ("three_step", None, True),
    "two steps, cut": ("two_step", None, True),
    "two steps, copied and drawn": ("two_step", 12, False),
    "joint, cut": ("joint", None, True),
    "joint, copied and drawn": ("joint", 12, False),
    "memory, cut and drawn": ("memory", 12, True),
    "sasrec, copied": ("sasrec", None, False),
    "sasrec, cut and drawn": ("sasrec", 12, True),
}
MOVED = "three steps, cut and drawn"  # from one process to several, and back
FAULTS = ("encoder", "augmenters")  # stages whose loss is not a number, on one rank
TERMS = {"next_item", "views_contrast", "augmented_contrast", "regulariser", "augmenters_loss"}
CLOSE = {"rtol": 0, "atol": 2e-6}


def config_of(case: str, count: int) -> SequenceRunConfig:
    form, negatives, is_cut = CASES[case]
    return replace(
        CONFIG,
        mclrec=FORMS[form],
        sequence=SequenceConfig(negatives=negatives),
        step=replace(CONFIG.step, global_batch_size=BATCHES[count]),
        parallel=ParallelConfig(replicate_below_rows=0 if is_cut else 2048),
    )


def make_trainer(rank: int, count: int, data: Path, output: Path, config: SequenceRunConfig) -> Trainer:
    dataset = SequenceDataset(data)
    ranks = Ranks(rank=rank, count=count) if count > 1 else ALONE
    plan = place_tables(config, dataset, ranks) if count > 1 else None
    return Trainer(build_model(config, dataset, plan=plan), NextItem(dataset, config), config, output, ranks=ranks)


def train(rank: int, count: int, data: Path, output: Path, config: SequenceRunConfig) -> dict[str, Any]:
    """Train, and return losses, weights, this rank's parts of tables, and the summary."""
    trainer = make_trainer(rank, count, data, output, config)
    summary = trainer.fit()
    rows = [
        (r.config.name, r.first_row, r.weight.numpy().copy())
        for tables in find_tables(trainer.model)
        for r in tables.rows()
        if r.is_primary
    ]
    records = [record for record in read_records(output) if record["kind"] == "train"]
    names = sorted(records[0].keys() & TERMS)
    return {
        "losses": [record["loss"] for record in records],
        "terms": [[record[name] for name in names] for record in records],
        "dense": {name: part.detach().numpy() for name, part in trainer.model.named_parameters()},
        "buffers": {name: part.numpy() for name, part in trainer.model.named_buffers()},
        "moments": [
            {name: np.asarray(part) for name, part in kept.items()}
            for kept in trainer.optimizer.state_dict()["state"].values()
        ],
        "rows": rows,
        "summary": summary,
    }


def train_until_fault(rank: int, count: int, data: Path, output: Path, stage: str) -> tuple[str, int, float]:
    """Train with a loss that is no number in one stage, on the last rank only; return how it ended, here and now."""
    trainer = make_trainer(rank, count, data, output, config_of(MOVED, count))
    task = trainer.step.task
    assert isinstance(task, NextItemTask)
    losses = task._loss

    def lose(hidden: HiddenStates, rows: Tensor, batch: SequenceBatch) -> StageLoss:
        found = losses(hidden, rows, batch)
        is_wrong = rank == count - 1 and task._stage == stage and trainer.progress.samples > 100
        return found._replace(loss=found.loss * float("nan")) if is_wrong else found

    task._loss = lose  # type: ignore[method-assign]
    try:
        how = str(trainer.fit()["stopped"])
    except ValueError as error:
        how = f"{type(error).__name__}: {error}"
    return how, trainer.progress.samples, sum(float(p.detach().double().sum()) for p in trainer.model.parameters())


def begin(config: SequenceRunConfig) -> SequenceRunConfig:
    return replace(config, epochs=1)


def do_everything(rank: int, count: int, data: Path, folder: Path, cases: list[str]) -> dict[str, Any]:
    """Starting ranks takes longer than what they do here: one start for all cases."""
    results = {case: train(rank, count, data, folder / case, config_of(case, count)) for case in cases}
    moved = config_of(MOVED, count)
    train(rank, count, data, folder / "begun by ranks", begin(moved))
    return results | {
        "begun by one": train(rank, count, data, folder / "begun by one", moved),
        "faults": [train_until_fault(rank, count, data, folder / stage, stage) for stage in FAULTS],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SyntheticSequencesConfig(num_users=80, num_items=60, num_tastes=4, mean_actions=6.0, most_actions=20)
    dataset = generate_sequences(config, tmp_path_factory.mktemp("sequences") / "data")
    assert [dataset.rows("train") % batch for batch in BATCHES.values()] == [1, 2]
    assert dataset.sides
    return dataset.folder


@dataclass
class Learned:
    """What ranks have learned, one process by itself, and one that has gone on from ranks; by case."""

    ranks: list[dict[str, Any]]
    alone: dict[str, Any]
    begun_by_ranks: dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, list(CASES)[:2]), id="2 ranks"),
        pytest.param((2, list(CASES)), id="2 ranks, all cases", marks=pytest.mark.long),
        pytest.param((3, list(CASES)), id="3 ranks, all cases", marks=pytest.mark.long),
    ],
)
def learned(
    request: pytest.FixtureRequest, data: Path, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory
) -> Learned:
    (count, cases), folder = request.param, tmp_path_factory.mktemp("runs")
    moved = config_of(MOVED, count)
    train(0, 1, data, folder / "begun by one", begin(moved))
    ranks = run_ranks(do_everything, count, data, folder, cases, seconds=60 + 60 * len(cases))
    alone = {case: train(0, 1, data, folder / f"{case}, alone", config_of(case, count)) for case in cases}
    return Learned(ranks, alone, train(0, 1, data, folder / "begun by ranks", moved))


def assert_same(results: list[dict[str, Any]], alone: dict[str, Any], case: str) -> None:
    """Hold what ranks have learned against what one process has."""
    np.testing.assert_allclose(results[0]["losses"], alone["losses"], rtol=0, atol=1e-5, err_msg=case)
    np.testing.assert_allclose(results[0]["terms"], alone["terms"], rtol=0, atol=1e-5, err_msg=case)
    for rank in results:
        assert rank["summary"] == results[0]["summary"]
        for own, other in zip(rank["moments"], alone["moments"], strict=True):
            for name, part in other.items():
                np.testing.assert_allclose(own[name], part, err_msg=f"{case}: {name}", **CLOSE)
        for kind in ("dense", "buffers"):
            assert rank[kind].keys() == alone[kind].keys()
            for name, part in alone[kind].items():
                np.testing.assert_allclose(rank[kind][name], part, err_msg=f"{case}: {name}", **CLOSE)
                np.testing.assert_array_equal(rank[kind][name], results[0][kind][name])
    found = {name: np.full_like(weight, np.nan) for name, _, weight in alone["rows"]}
    for name, first, weight in (part for rank in results for part in rank["rows"]):
        assert np.isnan(found[name][first : first + len(weight)]).all()
        found[name][first : first + len(weight)] = weight
    for name, _, weight in alone["rows"]:
        np.testing.assert_allclose(found[name], weight, err_msg=f"{case}: {name}", **CLOSE)
    measured = [name for name in alone["summary"] if name.startswith(("recall", "ndcg", "mrr", "coverage", "ties"))]
    assert len(measured) == 17
    ours, theirs = results[0]["summary"], alone["summary"]
    assert {name: ours[name] for name in measured} == pytest.approx({name: theirs[name] for name in measured})
    assert ours["ranked"] == pytest.approx(theirs["ranked"])


def test_ranks_learn_what_one_process_learns(learned: Learned) -> None:
    for case, alone in learned.alone.items():
        assert len(alone["losses"]) >= 10
        assert_same([result[case] for result in learned.ranks], alone, case)


def test_a_run_goes_on_in_another_number_of_processes(learned: Learned) -> None:
    alone = learned.alone[MOVED]
    assert_same([learned.begun_by_ranks], alone, "begun by ranks")
    assert_same([result["begun by one"] for result in learned.ranks], alone, "begun by one")


def test_a_loss_that_is_no_number_on_one_rank_ends_all(learned: Learned) -> None:
    for number in range(len(FAULTS)):
        ends = [result["faults"][number] for result in learned.ranks]
        assert ends == [ends[0]] * len(ends)  # also the sum of the weights, which is a number
        assert re.match(
            rf"NonFiniteLossError: .* \(on rank {len(ends) - 1}\); nothing was saved before; lower", ends[0][0]
        )
        assert 100 < ends[0][1] < 261

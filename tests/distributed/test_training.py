"""Training on several ranks is training in one process: the same losses, weights and metrics, each sample once."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dlrm.config import EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.model import DLRM, mlp
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.training.evaluate import evaluate
from dlrm.training.guards import find_tables
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer
from embeddings import RowWiseAdagrad, ShardingPlan, TableConfig
from embeddings.build import build_sequence_tables
from embeddings.shards import place

# Batches of 100 do not divide by 3, and the last one of an epoch, of 2 samples, leaves a rank without any.
TRAIN_ROWS, BATCH, STEPS = 1_002, 100, 22
CONFIG = TrainingConfig(
    epochs=2,
    seed=3,
    log_every_samples=1,
    dense=DenseOptimizerConfig(name="lamb", learning_rate=0.01),
    step=StepConfig(global_batch_size=BATCH, device="cpu", threads=1),
    evaluation=EvaluationConfig(every_samples=500, batch_size=64, test_best=False),
    guards=GuardConfig(chance_evaluations=0, constant_prediction=False),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A click log with features of one id and of several per row; the test split leaves ranks without samples too."""
    config = SyntheticConfig(num_train=TRAIN_ROWS, num_valid=257, num_test=193, max_ids=200, rows_per_part=400)
    return generate(config, tmp_path_factory.mktemp("click_log") / "data").folder


class Numbers(nn.Module):
    """Learns from numbers alone, and has a weight that it does not use."""

    def __init__(self, num_numeric):
        super().__init__()
        self.layers = mlp([num_numeric, 8, 1], last_is_linear=True)
        self.never_used = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return self.layers(batch.dense).squeeze(-1)


class Known(nn.Module):
    """Gives a logit that does not depend on the other rows of its batch, to the last bit; products of matrices do."""

    def forward(self, batch):
        return batch.dense[:, 0] - 0.3 * batch.dense[:, 1]


class Sequences(nn.Module):
    """Adds up what it learns from the vectors of all ids of a sample, which it asks for one by one."""

    def __init__(self, tables, plan):
        super().__init__()
        self.tables = build_sequence_tables(tables, plan=plan)
        self.weights = nn.Parameter(torch.ones(4))

    def forward(self, batch):
        logits = batch.dense[:, 2]
        for jagged in self.tables(batch.sparse).values():
            samples = torch.arange(len(batch)).repeat_interleave(jagged.lengths())
            logits = logits.index_add(0, samples, jagged.values() @ self.weights)
        return logits


def ranks_of(rank, count):
    return Ranks(rank=rank, count=count) if count > 1 else ALONE


def build_model(dataset, sharding, count, *, pooled=True):
    torch.manual_seed(dist.get_rank() if count > 1 else 0)  # the others have to take what rank 0 has drawn
    if sharding is None:
        return Numbers(len(dataset.info.numeric))
    optimizer = RowWiseAdagrad(learning_rate=0.05)
    tables = [TableConfig(name=f.name, num_rows=f.num_rows, dim=4, optimizer=optimizer) for f in dataset.info.features]
    plan = None
    if count > 1:
        placed = [
            place(table, sharding, [(number + rank) % count for rank in range(count)])
            if sharding != "replicated"
            else place(table, sharding, range(count))
            for number, table in enumerate(tables)
        ]
        plan = ShardingPlan(ranks=count, ranks_per_node=count, tables=tuple(placed))
    if not pooled:
        return Sequences(tables, plan)
    return DLRM(num_numeric=len(dataset.info.numeric), tables=tables, dim=4, bottom=(8,), top=(8,), plan=plan)


def train(rank, count, data, output, sharding, config=CONFIG):
    """Train, and return losses, weights, this rank's rectangles of tables, the rows it was given, and the summary."""
    dataset = Dataset(data)
    model = build_model(dataset, sharding, count)
    trainer = Trainer(model, dataset, config, output, ranks=ranks_of(rank, count))
    seen = []
    step = trainer.step.__class__.__call__

    def record(self, batch, *arguments, **options):
        seen.append(batch.rows.tolist())
        return step(self, batch, *arguments, **options)

    trainer.step.__class__ = type("Recorded", (trainer.step.__class__,), {"__call__": record})
    summary = trainer.fit()
    records = [record for record in read_records(Path(output)) if record["kind"] == "train"]
    losses, stages = [record["loss"] for record in records], [record["stages"] for record in records]
    dense = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    rows = [
        (r.config.name, r.first_row, r.first_column, r.weight.numpy())
        for tables in find_tables(model)
        for r in tables.rows()
        if r.is_primary
    ]
    described = json.loads((Path(output) / "tables.json").read_text())["tables"]
    return {
        "losses": losses,
        "stages": stages,
        "tables": described,
        "dense": dense,
        "rows": rows,
        "seen": seen,
        "summary": summary,
    }


def whole_tables(data, results):
    """Lay rectangles of all ranks side by side."""
    tables = {f.name: np.full((f.num_rows, 4), np.nan, np.float32) for f in Dataset(data).info.features}
    for result in results:
        for name, row, column, weight in result["rows"]:
            assert np.isnan(tables[name][row : row + len(weight), column : column + weight.shape[1]]).all()
            tables[name][row : row + len(weight), column : column + weight.shape[1]] = weight
    return tables


def train_until_fault(rank, count, data, output, fault):
    """Train with something wrong from the third step on, on the last rank only; return how it ended, here and now."""
    sharding = "table_wise" if fault in WITH_TABLES else None
    model = build_model(Dataset(data), sharding, count, pooled="sequence" not in fault)
    trainer = Trainer(model, Dataset(data), CONFIG, output, ranks=ranks_of(rank, count))
    take = trainer._batches

    def batches():
        for number, (batch, following) in enumerate(take()):
            if number == 3 and rank == count - 1:
                if fault == "asked to stop":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif fault == "time is up":
                    trainer.course.time_is_up = lambda: True
                elif "label" in fault:
                    batch.labels[0] = 7
                elif fault == "id":
                    following.sparse.values()[-1] = 10**6
                else:
                    batch.dense[-1, 2] = float("nan")
            yield batch, following

    trainer._batches = batches
    try:
        how = trainer.fit()["stopped"]
    except (KeyboardInterrupt, ValueError) as error:
        how = f"{type(error).__name__}: {error}"
    return how, trainer.progress.samples, sum(float(p.detach().double().sum()) for p in model.parameters())


def measure(rank, count, data):
    """Evaluate by segments, in batches that leave ranks without samples and in larger ones."""
    dataset = Dataset(data)
    single = next(f.name for f in dataset.info.features if not f.is_list)
    ranks = ranks_of(rank, count)
    return [
        evaluate(Known(), Reader(dataset, "test"), batch_size=size, segment_by=single, ranks=ranks) for size in (2, 64)
    ]


class Misled(nn.Module):
    """Asks for a row that does not exist, on one rank."""

    def __init__(self, model, *, misled):
        super().__init__()
        self.model, self.misled = model, misled

    def forward(self, batch):
        if self.misled:
            batch.sparse.values()[-1] = 10**6
        return self.model(batch)


def measure_a_wrong_id(rank, count, data):
    """Evaluate with a wrong id on the last rank; return the error, here and now."""
    dataset = Dataset(data)
    model = Misled(build_model(dataset, "table_wise", count), misled=rank == count - 1)
    try:
        evaluate(model, Reader(dataset, "test"), batch_size=64, ranks=ranks_of(rank, count))
    except ValueError as error:
        return str(error)
    return "none"


WITH_TABLES = ("label", "id", "not a number", "label of a sequence", "not a number in a sequence")
FAULTS = ("asked to stop", "time is up", *WITH_TABLES)
SHARDINGS = {2: ("table_wise", "replicated"), 3: ("row_wise", "column_wise")}


def do_everything(rank, count, data, folder):
    """Starting ranks takes longer than what they do here: one start for all tests of a number of ranks."""
    folder = Path(folder)
    return {
        "train": {kind: train(rank, count, data, folder / str(kind), kind) for kind in (None, *SHARDINGS[count])},
        "faults": {fault: train_until_fault(rank, count, data, folder / fault, fault) for fault in FAULTS},
        "measure": measure(rank, count, data),
        "wrong id": measure_a_wrong_id(rank, count, data),
    }


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One process' results, by whether the model has tables."""
    folder = tmp_path_factory.mktemp("alone")
    return {has: train(0, 1, data, folder / str(has), "table_wise" if has else None) for has in (False, True)}


@pytest.fixture(scope="module", params=[2, 3])
def results(request, data, start_ranks, tmp_path_factory):
    ranks = start_ranks(do_everything, request.param, data, tmp_path_factory.mktemp(f"runs_of_{request.param}"))
    return [result | {"said": ranks.output(rank)} for rank, result in enumerate(ranks.results())]


def test_ranks_learn_what_one_process_learns(results, data, alone):
    for sharding in (None, *SHARDINGS[len(results)]):
        expected, learned = alone[sharding is not None], [result["train"][sharding] for result in results]
        assert len(expected["losses"]) == STEPS
        np.testing.assert_allclose(learned[0]["losses"], expected["losses"], atol=1e-6, rtol=0)
        for rank in learned:
            assert rank["summary"] == learned[0]["summary"]
            for name, weight in expected["dense"].items():
                np.testing.assert_allclose(rank["dense"][name], weight, atol=1e-6, rtol=0, err_msg=name)
                np.testing.assert_array_equal(rank["dense"][name], learned[0]["dense"][name])
        assert learned[0]["summary"]["auc"] == pytest.approx(expected["summary"]["auc"], abs=1e-4)
        if sharding is not None:
            found, whole = whole_tables(data, learned), whole_tables(data, [expected])
            for name, rows in whole.items():
                np.testing.assert_allclose(found[name], rows, atol=1e-6, rtol=0, err_msg=name)
            for one, other in zip(learned[0]["tables"], expected["tables"], strict=True):
                # Every shard of columns has a sum of squares for its rows.
                assert sharding == "column_wise" or one["bytes"] == other["bytes"]
                norm = pytest.approx(other["mean_row_norm"], rel=1e-5)
                assert one == other | {"bytes": one["bytes"], "mean_row_norm": norm}


def test_the_time_of_a_step_is_taken_apart_over_ranks(results):
    count, sharding = len(results), SHARDINGS[len(results)][0]
    learned = results[0]["train"][sharding]
    exchanges = {"ids all-to-all", "rows all-to-all", "gradients all-to-all", "exposed all-reduce"}
    for stages in learned["stages"]:
        assert exchanges | {"lookup", "row update", "dense forward", "dense backward", "dense update"} <= stages.keys()
        assert "evaluation" not in stages
        assert 0.5 < sum(stage["share"] for stage in stages.values()) < 1.01
        for stage in stages.values():
            assert 0 <= stage["least"] <= stage["share"] <= stage["most"]
            assert stage["most_rank"] in range(count)
    summary = learned["summary"]
    assert {"evaluation", "checkpoint", *exchanges} <= summary["stages_of_ranks"].keys()
    assert summary["stage_seconds"]["lookup"] == summary["stages_of_ranks"]["lookup"]["seconds"]
    outside = ("evaluation", "checkpoint")
    inside = sum(seconds for name, seconds in summary["stage_seconds"].items() if name not in outside)
    assert inside == pytest.approx(summary["seconds"], rel=0.5)


def test_one_rank_speaks(results):
    assert "after 500 samples: auc" in results[0]["said"]
    assert [result["said"] for result in results[1:]] == [""] * (len(results) - 1)


def test_each_sample_is_trained_once_per_epoch_on_one_rank(results, alone):
    seen = [result["train"][None]["seen"] for result in results]
    steps = [[row for rows in parts for row in rows] for parts in zip(*seen, strict=True)]
    assert steps == alone[False]["seen"]  # shares side by side are the batch of one process
    assert sorted(row for rows in steps[: STEPS // 2] for row in rows) == list(range(TRAIN_ROWS))
    assert ([] in [rows for rank in seen for rows in rank]) == (len(results) == 3)


def test_metrics_are_those_of_one_process(results, data):
    expected = measure(0, 1, data)
    assert repr(expected[0]) == repr(expected[1])
    assert expected[0].samples == 193
    assert expected[0].segments
    for rank in results:
        assert repr(rank["measure"]) == repr(expected)  # NaN among them is equal to NaN


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("asked to stop", r"KeyboardInterrupt: and saved after 400 samples"),
        ("time is up", r"time limit of"),
        ("label", r"ValueError: row \d+ of split 'train': expected a label of 0 or 1, got 7"),
        ("label of a sequence", r"ValueError: row \d+ of split 'train': expected a label of 0 or 1, got 7"),
        ("id", r"ValueError: row \d+ of split 'train': feature '\w+'.*expected an id in .*, got 1000000"),
        (
            "not a number",
            r"NonFiniteLossError: .*after 400 samples; first in the data: numeric column '\w+' of row \d+ \(on rank",
        ),
        (
            "not a number in a sequence",
            r"NonFiniteLossError: .*after 400 samples; first in the data: numeric column '\w+' of row \d+ \(on rank",
        ),
    ],
)
def test_what_happens_to_one_rank_ends_all_at_the_same_step(results, fault, how):
    ends = [result["faults"][fault] for result in results]
    assert re.match(how, ends[0][0])
    assert ends == [ends[0]] * len(results)  # also the sum of the weights, which is a number
    assert ends[0][1] == (300 if fault.startswith(("label", "not a number")) else 400)
    assert math.isfinite(ends[0][2])


def test_a_wrong_id_of_an_evaluation_is_named_on_all_ranks(results):
    said = {result["wrong id"] for result in results}
    assert len(said) == 1
    assert re.match(r"row \d+ of split 'test': feature '\w+'.*expected an id in .*, got 1000000", said.pop())

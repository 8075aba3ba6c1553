"""Checkpoints move: over 1, 2 and 3 ranks and every sharding, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from deploy.export import ExportArguments, export
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.checkpoint_folder import read_state
from dlrm.checkpoints.manifest import read_manifest
from dlrm.checkpoints.run_state import load_model, load_random_state, take_model, take_random_state
from dlrm.config import CheckpointConfig, EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.model import DLRM
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.training.trainer import Trainer
from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad, ShardingPlan, TableConfig
from embeddings.build import build_tables
from embeddings.shards import SHARDINGS, place

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(600)  # all ranks start in the fixture of the first test
ROUNDS = {2: [*SHARDINGS, None], 3: ["grid", "column_wise", "row_wise", None]}  # None mixes two kinds
CONFIGS = [
    TableConfig(name="sgd", num_rows=7, dim=6, optimizer=RowSGD(learning_rate=0.1)),
    TableConfig(name="adagrad", num_rows=50, dim=6, optimizer=RowAdagrad(learning_rate=0.1)),
    TableConfig(name="rowwise", num_rows=31, dim=6, optimizer=RowWiseAdagrad(learning_rate=0.1)),
    TableConfig(name="lazy", num_rows=40, dim=6, optimizer=RowCowClip(learning_rate=0.1, l2_mode="lazy")),
    TableConfig(name="partial", num_rows=3, dim=6, optimizer=RowLamb(learning_rate=0.1, partial=True)),
    TableConfig(name="half", num_rows=20, dim=6, optimizer=RowAdam(learning_rate=0.1), row_type="bf16"),
]


class Model(nn.Module):
    """Tables with every optimizer, and a dense weight."""

    def __init__(self, plan, seed):
        super().__init__()
        self.tables = build_tables(CONFIGS, seed=seed, plan=plan)
        torch.manual_seed(seed)
        self.dense = nn.Linear(3, 2)


def make_plan(configs, sharding, ranks, per_node=1):
    kinds = [sharding] * len(configs) if sharding else ["row_wise", "replicated"] * len(configs)
    tables = [
        place(config, kind, list(range(ranks)), ranks_per_node=per_node)
        for config, kind in zip(configs, kinds, strict=False)
    ]
    return ShardingPlan(ranks=ranks, ranks_per_node=per_node, tables=tuple(tables))


def make_trained():
    """A model of one process whose rows and states all differ from those of a new one."""
    model = Model(None, seed=1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        lengths = torch.randint(0, 4, (len(CONFIGS) * 32,), generator=generator)
        ids = torch.cat(
            [
                torch.randint(0, config.num_rows, (int(part.sum()),), generator=generator)
                for config, part in zip(CONFIGS, lengths.split(32), strict=True)
            ]
        )
        batch = KeyedJaggedTensor(keys=[config.name for config in CONFIGS], values=ids, lengths=lengths)
        model.tables(batch).values().square().sum().backward()
    return model


def tensors_of(state):
    return {name: tensor.read() for name, tensor in state["tables"].items()}


def moments_of(state):
    numbered = state["dense_optimizer"]["state"].items()
    return {(number, name): value for number, held in numbered for name, value in held.items() if value.ndim}


def save(store, model, ranks, samples, **more):
    optimizer = {"state": {0: {"first_moment": torch.full((3,), float(ranks.rank))}}}
    random = take_random_state(CPU)
    state = {**take_model(model), "optimizer": optimizer, "random": random, "progress": {"at": samples}}
    state["stage_seconds"] = {"lookup": 1.5 + ranks.rank}
    store.save(state, samples=samples, **more)
    store.wait()


def go_round(rank, count, folder, start, per_node):
    """Restore and save again under one plan after the other; tell what came in and what went on."""
    ranks = Ranks(rank=rank, count=count)
    store = CheckpointStore(folder, keep_last=100, ranks=ranks)
    told = []
    for number, sharding in enumerate(ROUNDS[count]):
        model = Model(make_plan(CONFIGS, sharding, count, per_node), seed=100 + number)
        restored = store.restore_latest()
        assert restored.skipped == ()
        assert restored.info.samples == start + number
        assert load_model(model, restored.state) == ()
        torch.manual_seed(3 + 7 * rank)
        load_random_state(restored.state["random"], CPU)
        drawn = torch.rand(3).tolist()
        seconds = 1.5 + rank if "torch" in restored.state["random"] else None
        assert restored.state["stage_seconds"].get("lookup") == seconds
        assert restored.state["progress"] == {"at": start + number}
        assert restored.state["optimizer"]["state"][0]["first_moment"].tolist() == [0.0] * 3
        save(store, model, ranks, start + number + 1, is_best=number == 2)
        copied = sum(copy.nbytes for (group, _), copy in store._copies.items() if group == "tables")
        told.append((drawn, sorted(restored.state["random"]), sharding, copied))
    best = store.restore_best()
    assert best.info.samples == start + 3
    return told


def test_any_ranks_restore_what_any_others_saved_under_every_sharding(moved, tmp_path):
    folder, two, three = moved.folder / "round", moved.two["round"], moved.three["round"]
    store = CheckpointStore(folder, keep_last=100)
    assert {name.rpartition(".")[2] for name in moved.expected} == {
        *("weight", "sum_of_squares", "first_moment", "second_moment", "last_update", "updates")
    }
    new = tensors_of(take_model(Model(None, seed=1)))
    assert all(not torch.equal(value, new[name]) for name, value in moved.expected.items())

    assert [info.samples for info in store.list()] == list(range(111, 99, -1))
    model = Model(None, seed=9)
    for info in store.list():
        state = read_state(info.folder, read_manifest(info.folder))
        assert read_manifest(info.folder).ranks == (1 if info.samples == 100 else 2 if info.samples <= 107 else 3)
        assert tensors_of(state).keys() == moved.expected.keys()
        load_model(model, state)
        for name, value in tensors_of(take_model(model)).items():
            assert torch.equal(moved.expected[name], value), (info.samples, name)
        assert torch.equal(model.dense.weight, moved.dense_weight)
        load_model(model, take_model(Model(None, seed=9)))

    # The first restore finds the generators of rank 0 only: the other draws numbers of its own. Later each has its own.
    for told in (two, three):
        numbers = [drawn for rank in told for drawn, *_ in rank]
        assert len({tuple(drawn) for drawn in numbers}) == len(numbers)
    assert two[1][0][1] == three[2][0][1] == ["rank", "samples"]
    assert two[1][1][1] == three[1][0][1] == ["numpy", "python", "torch"]

    # Nobody copies more than its own rectangles.
    whole = sum(value.nbytes for value in moved.expected.values())
    for told in (two, three):
        for of_ranks in zip(*told, strict=True):
            sizes = [size for *_, size in of_ranks]
            assert sum(sizes) == whole
            if of_ranks[0][2] == "row_wise":
                assert max(sizes) < 1.3 * whole / len(sizes)


def test_exports_tell_nothing_of_ranks_and_plans(moved, tmp_path):
    tables = {config.name: {"features": config.features, "pooling": config.pooling} for config in CONFIGS}
    (moved.folder / "config.json").write_text(json.dumps({"network": {"tables": tables}}))
    exported = []
    for info in CheckpointStore(moved.folder / "round").list():
        output = tmp_path / info.folder.name
        export(ExportArguments(source=info.folder, output=output, row_states=True))
        exported.append({path.name: path.read_bytes() for path in output.glob("*.safetensors")})
    assert len(exported) == 12
    assert all(files == exported[-1] for files in exported)  # the last one is that of a single process
    found = load_file(output / "tables-00001.safetensors")
    assert found.keys() == moved.expected.keys()
    assert all(torch.equal(found[name], value) for name, value in moved.expected.items())


TRAIN_ROWS, BATCH = 1_002, 100


def train(rank, count, data, output, samples, sharding):
    """Train on so many samples, going on from what others have left in `output`."""
    ranks, dataset = Ranks(rank=rank, count=count), Dataset(Path(data))
    torch.manual_seed(2)
    optimizers = [RowAdam(learning_rate=0.01), RowWiseAdagrad(learning_rate=0.05), RowLamb(learning_rate=0.01)]
    tables = [
        TableConfig(name=feature.name, num_rows=feature.num_rows, dim=4, optimizer=optimizers[number % 3])
        for number, feature in enumerate(dataset.info.features)
    ]
    plan = make_plan(tables, sharding, count) if count > 1 else None
    model = DLRM(num_numeric=len(dataset.info.numeric), tables=tables, dim=4, bottom=(8,), top=(8,), seed=2, plan=plan)
    config = TrainingConfig(
        epochs=samples / TRAIN_ROWS,
        seed=3,
        log_every_samples=1,
        dense=DenseOptimizerConfig(name="lamb", learning_rate=0.01),
        step=StepConfig(global_batch_size=BATCH, device="cpu", threads=1),
        evaluation=EvaluationConfig(every_samples=500, batch_size=64, test_best=False),
        guards=GuardConfig(chance_evaluations=0, constant_prediction=False),
        checkpoint=CheckpointConfig(every_samples=200, keep_last=1),
    )
    summary = (trainer := Trainer(model, dataset, config, Path(output), ranks=ranks)).fit()
    assert "rank" not in trainer.stopwatch.seconds  # of one that begins anew
    return summary["samples"], summary["logloss"]


def live_through(rank, count, folder, data):
    """Do all that is to be done by so many ranks, as starting them takes longest."""
    folder = Path(folder)
    start, samples, sharding = {2: (100, 600, "column_wise"), 3: (107, 900, None)}[count]
    return {
        "round": go_round(rank, count, folder / "round", start, 1),
        "reached": train(rank, count, data, folder / "moved", samples, sharding)[0],
    }


@pytest.fixture(scope="module")
def moved(run_ranks, tmp_path_factory):
    """What was saved by 1, then 2, then 3 ranks, each going on from the ones before; and what they tell."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("moved")
    config = SyntheticConfig(num_train=TRAIN_ROWS, num_valid=257, num_test=193, max_ids=200, rows_per_part=400)
    data = str(generate(config, folder / "data").folder)
    trained = make_trained()
    save(CheckpointStore(folder / "round", keep_last=100), trained, ALONE, 100)
    train(0, 1, data, folder / "moved", 300, None)
    told = [run_ranks(live_through, count, str(folder), data, seconds=500) for count in (2, 3)]
    two, three = ({name: [rank[name] for rank in ranks] for name in ranks[0]} for ranks in told)
    return SimpleNamespace(
        folder=folder,
        data=data,
        expected=tensors_of(take_model(trained)),
        dense_weight=trained.dense.weight.detach(),
        two=two,
        three=three,
    )


def test_a_run_goes_on_under_other_ranks_and_plans_as_if_nothing_had_happened(moved):
    assert moved.two["reached"] == [600] * 2
    assert moved.three["reached"] == [900] * 3
    samples, logloss = train(0, 1, moved.data, moved.folder / "whole", 1_202, None)
    assert samples == 1_202
    assert train(0, 1, moved.data, moved.folder / "moved", samples, None) == (samples, pytest.approx(logloss, abs=1e-6))
    ours, theirs = (
        CheckpointStore(moved.folder / name / "checkpoints").restore_latest().state for name in ("moved", "whole")
    )
    assert ours["progress"]["samples"] == theirs["progress"]["samples"] == samples
    found, expected = tensors_of(ours), tensors_of(theirs)
    moments = moments_of(theirs)
    assert len({name for _, name in moments}) == 2  # LAMB's
    assert all(value.abs().max() > 0 for value in moments.values())
    expected |= theirs["dense"] | moments
    found |= ours["dense"] | moments_of(ours)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6, msg=str(name))

"""On several ranks the gradients' noise is that of one process, and all ranks let the batch grow alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dlrm.config import EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.model import DLRM
from dlrm.noise.config import NoiseScaleConfig
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.training.adversarial_config import AdversarialConfig
from dlrm.training.batch_growth_config import BatchGrowthConfig
from dlrm.training.noise_watch import NoiseWatch
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer
from embeddings import RowWiseAdagrad, ShardingPlan, TableConfig
from embeddings.shards import place

BATCH, ROWS = 61, 900
CONFIG = TrainingConfig(
    log_every_samples=1,
    dense=DenseOptimizerConfig(name="sgd", learning_rate=0.05),
    step=StepConfig(global_batch_size=BATCH, device="cpu", threads=1),
    evaluation=EvaluationConfig(test_best=False),
    guards=GuardConfig(chance_evaluations=0, constant_prediction=False),
    noise_scale=NoiseScaleConfig(every_steps=1),
)
GROWING = BatchGrowthConfig(
    test="augmented", first_measurements=2, max_batch_size=500, inner_product_tolerance=0.2, round_to=4
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    config = SyntheticConfig(num_train=ROWS, num_valid=200, num_test=200, max_ids=100, rows_per_part=700)
    return generate(config, tmp_path_factory.mktemp("click_log") / "data").folder


def build_model(dataset: Dataset, count: int) -> DLRM:
    torch.manual_seed(0)
    optimizer = RowWiseAdagrad(learning_rate=0.1)
    tables = [TableConfig(name=f.name, num_rows=f.num_rows, dim=4, optimizer=optimizer) for f in dataset.info.features]
    kinds = ("row_wise", "table_wise", "replicated", "column_wise")
    plan = None
    if count > 1:
        placed = [place(table, kinds[number % 4], range(count)) for number, table in enumerate(tables)]
        plan = ShardingPlan(ranks=count, ranks_per_node=count, tables=tuple(placed))
    return DLRM(num_numeric=len(dataset.info.numeric), tables=tables, dim=4, bottom=(8,), top=(8,), plan=plan)


def train(rank: int, count: int, data: Path, output: Path, config: TrainingConfig) -> dict[str, list]:
    """Train, and return what was logged, the batch sizes, and every step's sums."""
    torch.set_num_threads(1)
    dataset = Dataset(data)
    ranks = Ranks(rank=rank, count=count) if count > 1 else ALONE
    trainer = Trainer(build_model(dataset, count), dataset, config, output, ranks=ranks)
    sums = []
    for member in trainer.attachments.members:
        if isinstance(member, NoiseWatch):
            after_backward = member.after_backward

            def record(moment, watch=member, measure=after_backward):
                measure(moment)
                if watch.latest is not None:
                    sums.append({name: tuple(group) for name, group in watch.latest.groups.items()})

            member.after_backward = record
    trainer.fit()
    records = [r for r in read_records(Path(output)) if r["kind"] == "train"] if rank == 0 else []
    return {"sums": sums, "sizes": trainer.sizes.state(), "losses": [r["loss"] for r in records]}


def train_all(rank: int, count: int, data: Path, output: Path) -> dict[str, dict[str, list]]:
    """Train a growing run and two adversarial ones."""
    changes = {"growing": {"growth": GROWING}}
    for staleness in (0, 1):
        adversarial = AdversarialConfig(eps=0.2, staleness=staleness)
        changes[f"adversarial {staleness}"] = {"adversarial": adversarial, "noise_scale": NoiseScaleConfig()}
    return {
        name: train(rank, count, data, output / name, TrainingConfig(**(vars(CONFIG) | change)))
        for name, change in changes.items()
    }


@pytest.fixture(scope="module")
def runs(run_ranks, data, tmp_path_factory) -> list[dict[str, dict[str, list]]]:
    """What one process gives, and each of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    return [train_all(0, 1, data, folder / "one"), *run_ranks(train_all, 2, data, folder / "two", seconds=270)]


def test_two_ranks_measure_and_decide_as_one_process(runs) -> None:
    alone, first, second = (run["growing"] for run in runs)
    assert first["sums"] == second["sums"]  # to the last bit
    assert first["sizes"] == second["sizes"] == alone["sizes"]
    assert len(first["sizes"]) > 1
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for ours, theirs in zip(first["sums"], alone["sums"], strict=True):
        samples = theirs["dense"][0]
        own = [samples // 2, samples - samples // 2]
        for name, (count, pairs, squares, squared_sums) in ours.items():
            assert count == samples
            assert squares == pytest.approx(theirs[name][2], rel=1e-3)
            if name.startswith(("table", "ids/")):  # of which each rank knows its own samples' only
                assert pairs == sum(number * (number - 1) for number in own)
                assert 0 <= squared_sums <= 2 * theirs[name][3] + squares
            else:
                assert (pairs, squared_sums) == (samples * (samples - 1), pytest.approx(theirs[name][3], rel=1e-3))


@pytest.mark.parametrize("staleness", [0, 1])
def test_adversaries_of_two_ranks_are_those_of_one_process(runs, staleness) -> None:
    alone, first, _ = (run[f"adversarial {staleness}"] for run in runs)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)


def test_fresh_and_stale_adversaries_differ(runs) -> None:
    assert runs[0]["adversarial 0"]["losses"][1:] != pytest.approx(runs[0]["adversarial 1"]["losses"][1:], rel=1e-6)

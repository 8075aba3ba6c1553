"""Cool-downs branched off one run: each is, bit for bit, the run that had its schedule from the start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dlrm.cli import parse
from dlrm.config import CheckpointConfig, EvaluationConfig, GuardConfig, RunConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.distributed.ranks import Ranks, T
from dlrm.model import DLRM
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.plateau import PlateauConfig
from dlrm.training.restore import _find_branching_point
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[3]
Train = Callable[..., Trainer]
TRUNK = TrainingConfig(
    epochs=0.5,
    dense=DenseOptimizerConfig(name="adam", learning_rate=0.003),
    dense_schedule=Schedule(shape="rsqrt(4000, warmup=1000)"),
    tables_schedule=Schedule(shape="rsqrt(4000)"),
    step=StepConfig(global_batch_size=300),  # cut at the ends of epochs
    log_every_samples=1500,
    evaluation=EvaluationConfig(every_samples=3000),
    checkpoint=CheckpointConfig(every_samples=1500, keep_last=10),
    guards=GuardConfig(chance_evaluations=0),
)


def _cooled(until: int) -> TrainingConfig:
    return replace(
        TRUNK,
        epochs=until / 12_000,
        dense_schedule=Schedule(shape=f"rsqrt(4000, warmup=1000, until={until}, cooldown=1500)"),
        tables_schedule=Schedule(shape=f"rsqrt(4000, until={until}, cooldown=1500)"),
    )


@pytest.fixture
def train(tmp_path: Path, make_dlrm: Callable[..., DLRM], click_log: Dataset) -> Train:
    def run(name: str, config: TrainingConfig, data: Dataset = click_log, **settings: Any) -> Trainer:
        trainer = Trainer(make_dlrm(click_log, dropout=0.1, **settings), data, config, tmp_path / name)
        trainer.fit()
        return trainer

    return run


def _states(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return what the last checkpoint holds, as the model has gone back to its best."""
    restored = trainer.checkpoints.restore_latest()
    assert restored is not None
    tensors = {f"dense.{name}": tensor for name, tensor in restored.state["dense"].items()}
    for name, tensor in restored.state["tables"].items():
        tensors[name] = torch.cat(list(tensor.blocks()))
    for key, state in restored.state["dense_optimizer"]["state"].items():
        tensors |= {f"{key}.{name}": value for name, value in state.items()}
    return tensors | {"random": restored.state["random"]["torch"]}


def test_two_cooldowns_of_one_run_are_those_of_runs_of_their_own(train: Train, tmp_path: Path) -> None:
    train("trunk", TRUNK)
    for until in (3000, 4500):
        branch = replace(_cooled(until), branch_from=tmp_path / "trunk", branch_at=until - 1500)
        branched, whole = train(f"branch-{until}", branch), train(f"whole-{until}", _cooled(until))
        ends = [_states(branched), _states(whole)]
        assert ends[0].keys() == ends[1].keys()
        assert len(ends[0]) > 10
        assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
        losses = [
            [(r["samples"], r["loss"]) for r in read_records(tmp_path / name) if r["kind"] == "train"]
            for name in (f"branch-{until}", f"whole-{until}")
        ]
        assert losses[0] == losses[1]  # those of the trunk are taken over up to the branching point
        assert len(losses[0]) == until / 1500
    records = read_records(tmp_path / "trunk")
    assert max(record["samples"] for record in records) == 6000


def test_a_branch_goes_on_from_its_own_checkpoints(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("trunk", replace(TRUNK, epochs=0.25))
    branch = replace(_cooled(4500), branch_from=tmp_path / "trunk", branch_at=1600)
    train("branch", replace(branch, epochs=3000 / 12_000))
    assert f"branching off from {tmp_path / 'trunk'} after 1,500 samples" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "trunk")
    cut = train("branch", branch)
    assert "continuing after 3,000 samples" in capsys.readouterr().err
    whole = train("whole", _cooled(4500))
    assert all(torch.equal(tensor, _states(whole)[name]) for name, tensor in _states(cut).items())


def test_the_best_of_a_branch_is_its_own(train: Train, tmp_path: Path) -> None:
    train("trunk", replace(TRUNK, epochs=0.25))
    still = Schedule(shape="1e-12")  # so that nothing gets better than the trunk was
    frozen = replace(TRUNK, dense_schedule=still, tables_schedule=still, branch_from=tmp_path / "trunk")
    branch = train("branch", frozen)
    assert branch.progress.best_samples == 6000
    best = branch.checkpoints.restore_best()
    assert best is not None
    assert best.info.folder.parent == tmp_path / "branch" / "checkpoints"


def test_what_cannot_be_a_branch_is_named(
    train: Train, tmp_path: Path, make_dataset: Callable[..., Dataset], click_log: Dataset
) -> None:
    train("trunk", replace(TRUNK, epochs=0.25))
    branch = replace(TRUNK, branch_from=tmp_path / "trunk")
    with pytest.raises(
        ValueError, match=r"--branch-from: expected the settings of .*trunk but for .* got seed = 3, there 0"
    ):
        train("seed", replace(branch, seed=3))
    with pytest.raises(ValueError, match=r"got dense\.weight_decay = 0\.1, there 0\.0"):
        train("decay", replace(branch, dense=replace(TRUNK.dense, weight_decay=0.1)))
    with pytest.raises(
        ValueError, match=r"--branch-at 1000: expected a checkpoint of .*; kept: the checkpoints after 3,0"
    ):
        train("early", replace(branch, branch_at=1000))
    with pytest.raises(ValueError, match=r"--branch-from: expected the folder of a run, got .*nothing"):
        train("nothing-there", replace(branch, branch_from=tmp_path / "nothing"))
    other = Dataset(click_log.folder)
    other.__dict__["fingerprint"] = "of other rows"
    with pytest.raises(ValueError, match="one of other data"):
        train("data", branch, other)
    with pytest.raises(ValueError, match="--branch-from: expected a run beside --branch-at 5, got none"):
        parse(RunConfig, ["--branch-at", "5"], program="recforge train synthetic")


def test_a_branch_with_another_plateau_begins_it_anew(train: Train, tmp_path: Path) -> None:
    still = replace(TRUNK, epochs=0.25, dense_schedule=Schedule(shape="1e-9"), tables_schedule=Schedule(shape="1e-9"))
    reduce = PlateauConfig(policy="reduce", patience=1, least_gain=0.5)  # which nothing gains
    change = PlateauConfig(policy="change", patience=1, least_gain=0.5, shapes=("1", "0.7", "3"), start=2)
    train("reduced", replace(still, plateau=reduce, epochs=0.5))
    train("changed", replace(still, plateau=change, epochs=0.5))
    branches = {
        "changed": (replace(change, shapes=("0.2", "0.5"), start=1), 0.5),
        "reduced": (replace(reduce, factor=0.3), 1.0),
    }
    for trunk, (plateau, factor) in branches.items():
        for other in branches:
            name = f"{trunk}-after-{other}"
            train(name, replace(still, epochs=0.55, plateau=plateau, branch_from=tmp_path / other))
            last = [record for record in read_records(tmp_path / name) if record["kind"] == "train"][-1]
            assert last["plateau_factor"] == factor
    train("alike", replace(still, epochs=0.55, plateau=reduce, branch_from=tmp_path / "reduced"))
    last = [record for record in read_records(tmp_path / "alike") if record["kind"] == "train"][-1]
    assert last["plateau_factor"] == 0.5


def test_a_branch_has_the_batch_sizes_of_its_trunk(train: Train, tmp_path: Path) -> None:
    def staged(rate: float, size: int) -> TrainingConfig:
        shape = f"stages((3000, 300), (9000, {size}, 0, {rate}))"
        return replace(TRUNK, epochs=0.4, dense_schedule=Schedule(shape=shape))

    train("trunk", staged(2, 600))
    branch = replace(staged(0.5, 600), epochs=0.5, branch_from=tmp_path / "trunk")
    assert train("other-rates", branch).sizes.at(5000) == 600
    for name, config in (("other-sizes", staged(2, 900)), ("none", TRUNK)):
        with pytest.raises(
            ValueError, match=r"--branch-from: expected the batch sizes of .*trunk, .* there 300 from s"
        ):
            train(name, replace(config, branch_from=tmp_path / "trunk"))


class _OtherRankFails(Ranks):
    def gather(self, thing: T) -> list[T]:
        return [thing, cast(T, ValueError("--branch-from: rank 1 does not see it"))]


def test_all_ranks_say_that_one_does_not_see_the_trunk(train: Train, tmp_path: Path) -> None:
    settings = train("trunk", replace(TRUNK, epochs=0.25)).settings
    assert _find_branching_point(tmp_path / "trunk", None, settings, Ranks()).info.samples == 3000
    with pytest.raises(ValueError, match="rank 1 does not see it"):
        _find_branching_point(tmp_path / "trunk", None, settings, _OtherRankFails())
    with pytest.raises(ValueError, match="expected the folder of a run"):
        _find_branching_point(tmp_path / "nothing", None, settings, _OtherRankFails())


@pytest.mark.long
def test_over_two_ranks_a_branch_measures_what_a_run_of_its_own_does(tmp_path: Path, click_log: Dataset) -> None:
    flags = {
        "data": click_log.folder, "ranks": 2, "step.global-batch-size": 500, "evaluation.every-samples": 3000,
        "checkpoint.every-samples": 3000, "checkpoint.keep-last": 5, "guards.chance-evaluations": 0,
    }  # fmt: skip
    trunk = {"dense-schedule.shape": "rsqrt(4000, warmup=1000)"}
    cooled = {
        "dense-schedule.shape": "rsqrt(4000, warmup=1000, until=9000, cooldown=3000)", "epochs": 0.75,
        "plateau.policy": "reduce", "plateau.patience": 1,
    }  # fmt: skip
    branch = cooled | {"branch-from": tmp_path / "trunk", "branch-at": 6500}
    for name, own in (("trunk", trunk), ("branch", branch), ("whole", cooled)):
        told = [text for flag, value in (flags | own).items() for text in (f"--{flag}", str(value))]
        command = [sys.executable, "-m", "dlrm", "train", "synthetic", "--output", str(tmp_path / name), *told]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=250)
    measured = [
        [(r["samples"], r["auc"], r["logloss"]) for r in read_records(tmp_path / name) if r["kind"] == "valid"]
        for name in ("branch", "whole")
    ]
    assert measured[0] == measured[1]
    assert [samples for samples, *_ in measured[0]] == [3000, 6000, 9000]

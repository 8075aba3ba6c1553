"""The loop: it learns, stops when told to, keeps the best, continues where it stopped, and writes what it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.cli import main
from dlrm.config import EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset, Part, write_part
from dlrm.data.prepare import prepare
from dlrm.data.reader import Reader
from dlrm.data.schema import CategoricalColumn, DataSchema
from dlrm.data.value_names import name_values
from dlrm.distributed.hang_watch import LAST_CHECKPOINT, RESTORING, UNTIMED
from dlrm.model import DLRM
from dlrm.optim.lr_schedules import Schedule
from dlrm.training.evaluate import evaluate
from dlrm.training.run_log import read_records
from dlrm.training.train_step import compile_dense
from dlrm.training.trainer import Trainer

Make = Callable[..., DLRM]
BASE = TrainingConfig(
    epochs=2,
    step=StepConfig(global_batch_size=100),
    log_every_samples=1000,
    evaluation=EvaluationConfig(every_samples=3000),
)
UNGUARDED = GuardConfig(chance_evaluations=0)  # for runs too short to learn


def test_what_waits_for_checkpoints_is_a_stage_without_a_limit(
    tmp_path: Path, make_dlrm: Make, click_log: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(BASE, epochs=0.25, guards=UNGUARDED)
    trainer = Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run")
    found: set[tuple[str, str]] = set()

    def watch(name: str) -> None:
        call = getattr(CheckpointStore, name)

        def note(store: CheckpointStore) -> object:
            found.add((name, ["", *trainer.stopwatch.open][-1]))
            return call(store)

        monkeypatch.setattr(CheckpointStore, name, note)

    for name in ("restore_latest", "restore_best", "wait"):
        watch(name)
    trainer.fit()
    assert found == {
        *(("restore_latest", RESTORING), ("restore_best", RESTORING), ("wait", RESTORING)),
        *(("wait", "checkpoint"), ("wait", LAST_CHECKPOINT)),
    }
    assert {RESTORING, LAST_CHECKPOINT} <= set(UNTIMED)


def test_the_summary_is_what_the_best_weights_give_on_the_test_split(
    tmp_path: Path, make_dlrm: Make, click_log: Dataset
) -> None:
    model = make_dlrm(click_log)
    summary = Trainer(model, click_log, replace(BASE, epochs=4), tmp_path / "run").fit()
    again = evaluate(model, Reader(click_log, "test"))
    assert summary["auc"] == again.auc
    assert summary["samples"] == 48_000
    assert 0.5 < summary["auc"] < summary["bayes_auc"] < 1
    records = [record for record in read_records(tmp_path / "run") if record["kind"] == "valid"]
    assert [record["samples"] for record in records] == list(range(3000, 48_001, 3000))
    best = max(records, key=lambda record: record["auc"])
    assert summary["best_samples"] == best["samples"]
    assert evaluate(model, Reader(click_log, "valid")).auc == best["auc"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["auc"] == summary["auc"]
    tables = json.loads((tmp_path / "run" / "tables.json").read_text())["tables"]
    assert [table["name"] for table in tables] == [feature.name for feature in click_log.info.features]


def test_losses_in_tensorboard_are_those_in_the_log(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    Trainer(make_dlrm(click_log), click_log, BASE, tmp_path / "run").fit()
    losses = {r["samples"]: r["loss"] for r in read_records(tmp_path / "run") if r["kind"] == "train"}
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(shown) == list(range(1000, 24_001, 1000))
    assert shown == pytest.approx(losses)
    assert losses[24_000] < losses[1000]


def test_stops_at_the_target(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    config = replace(BASE, epochs=20, evaluation=EvaluationConfig(every_samples=3000, stop_at=0.6))
    summary = Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run").fit()
    aucs = [record["auc"] for record in read_records(tmp_path / "run") if record["kind"] == "valid"]
    assert summary["stopped"] == "auc reached 0.6"
    assert aucs[-1] >= 0.6
    assert all(auc < 0.6 for auc in aucs[:-1])
    # the same command again finds the target reached
    assert Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run").fit()["samples"] == summary["samples"]


def test_stops_when_nothing_gets_better(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    evaluation = EvaluationConfig(every_samples=1000, patience=2, metric="logloss")
    config = replace(BASE, epochs=100, evaluation=evaluation)
    summary = Trainer(make_dlrm(click_log, learning_rate=0.5), click_log, config, tmp_path / "run").fit()
    losses = [record["logloss"] for record in read_records(tmp_path / "run") if record["kind"] == "valid"]
    assert summary["stopped"] == "no better logloss in 2 evaluations"
    assert min(losses) == losses[-3]


def test_stops_at_the_time_limit(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    config = replace(BASE, epochs=1000, time_limit_seconds=0.5)
    summary = Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run").fit()
    assert summary["stopped"] == "time limit of 0.5 seconds"
    assert 0.5 <= summary["seconds"] < 5


def test_schedules_reach_both_kinds_of_weights(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    frozen = Schedule(warmup_samples=1, hold_samples=0, decay_samples=1)  # zero from the second sample on
    for dense, tables in ((frozen, Schedule()), (Schedule(), frozen)):
        model = make_dlrm(click_log)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        config = replace(BASE, epochs=0.5, dense_schedule=dense, tables_schedule=tables, guards=UNGUARDED)
        Trainer(model, click_log, config, tmp_path / f"run-{dense is frozen}").fit()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        weights = {name for name in moved if name.endswith((".weight", ".bias"))}
        assert any(name.startswith("dense.") for name in weights) == (dense is not frozen)
        assert any(name.startswith("tables.") for name in weights) == (tables is not frozen)


def test_auc_by_segment_covers_the_split(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    single = min((f for f in click_log.info.features if not f.is_list), key=lambda f: f.num_rows)
    config = replace(BASE, evaluation=EvaluationConfig(segment_by=single.name))
    summary = Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run").fit()
    assert sum(segment["samples"] for segment in summary["segments"]) == click_log.rows("test")
    assert [segment["name"] for segment in summary["segments"]] == [str(s["segment"]) for s in summary["segments"]]


def test_segments_are_named_by_their_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    countries = rng.choice(["fr", "de", "", "li"], 900, p=[0.5, 0.3, 0.19, 0.01])
    lines = [f"{label},{country}" for label, country in zip(rng.integers(0, 2, 900), countries, strict=True)]
    (tmp_path / "clicks.csv").write_text("\n".join(["click,country", *lines]) + "\n")
    column = CategoricalColumn(name="country", min_count=50)
    dataset = prepare(
        DataSchema(format="csv", label="click", categorical=(column,)), [tmp_path / "clicks.csv"], tmp_path / "data"
    )
    assert name_values(dataset, "country", [2, 3, 1, 0]) == ["fr", "de", "(missing)", "(rare or unseen)"]


def test_training_in_bf16_comes_close_to_plain(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    plain = Trainer(make_dlrm(click_log), click_log, BASE, tmp_path / "plain").fit()
    half = replace(BASE, step=replace(BASE.step, precision="bf16"))
    assert Trainer(make_dlrm(click_log), click_log, half, tmp_path / "bf16").fit()["auc"] == pytest.approx(
        plain["auc"], abs=0.02
    )


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, which warns of itself
def test_compiled_training_comes_close_to_plain(tmp_path: Path, make_dlrm: Make, click_log: Dataset) -> None:
    plain, compiled = make_dlrm(click_log), make_dlrm(click_log)
    compile_dense(compiled, torch.device("cpu"))
    aucs = [
        Trainer(model, click_log, BASE, tmp_path / name).fit()["auc"]
        for name, model in (("plain", plain), ("compiled", compiled))
    ]
    assert aucs[1] == pytest.approx(aucs[0], abs=1e-3)
    assert plain.state_dict().keys() == compiled.state_dict().keys()  # a checkpoint serves both


def command(output: Path, data: Path, *flags: str) -> list[str]:
    small = ["--step.global-batch-size", "100", "--step.threads", "1", "--log-every-samples", "1000"]
    return ["train", "synthetic", "--data", str(data), "--output", str(output), *small, *flags]


def test_an_interrupted_run_is_saved_and_continues(tmp_path: Path, click_log: Dataset) -> None:
    flags = ["--epochs", "15", "--evaluation.every-samples", "12000"]
    arguments = command(tmp_path / "run", click_log.folder, *flags)
    process = subprocess.Popen([sys.executable, "-m", "dlrm", *arguments], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("run/checkpoints/samples-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "the same command continues" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    assert main([*arguments[:-4], "--epochs", "16", *flags[2:]]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 16 * 12_000


def test_another_configuration_is_not_mixed_into_a_run(
    tmp_path: Path, click_log: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--epochs", "0.1"]
    assert main(command(tmp_path / "run", click_log.folder, *flags)) == 0
    assert "AUC" in capsys.readouterr().out.upper()
    assert main(command(tmp_path / "run", click_log.folder, *flags, "--model.dim", "8")) == 2
    assert "holds a run with model.dim = 16, got 8" in capsys.readouterr().err


def test_another_configuration_is_not_mixed_into_a_run_of_the_python_api(
    tmp_path: Path, make_dlrm: Make, click_log: Dataset
) -> None:
    summary = Trainer(make_dlrm(click_log), click_log, BASE, tmp_path / "run").fit()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["step"]["global_batch_size"] == 100
    assert Trainer(make_dlrm(click_log), click_log, BASE, tmp_path / "run").fit()["auc"] == summary["auc"]
    for model, config, message in (
        (
            make_dlrm(click_log),
            replace(BASE, step=StepConfig(global_batch_size=64)),
            r"global_batch_size = 100, got 64",
        ),
        (make_dlrm(click_log, learning_rate=0.001), BASE, r"optimizer.learning_rate = 0.05, got 0.001"),
        (make_dlrm(click_log, interaction="fm"), BASE, r"network.parameters.*top.0.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(model, click_log, config, tmp_path / "run")


def test_a_metric_that_is_not_defined_is_never_the_best(
    tmp_path: Path, make_dlrm: Make, make_dataset: Callable[..., Dataset]
) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 10, 2000)
    dataset = make_dataset((ids % 2).astype(np.uint8), ids)
    only_zeros = Part(
        label=np.zeros(10), numeric=np.zeros((10, 1)), features={"a": ids[:10].astype(np.int32)}, extra={}
    )
    part = write_part(dataset.folder, "valid", 0, only_zeros)
    replace(dataset.info, splits={**dataset.info.splits, "valid": (part,)}).write(dataset.folder)
    dataset = Dataset(dataset.folder)
    config = replace(BASE, epochs=5, evaluation=EvaluationConfig(every_samples=500, patience=2))
    summary = Trainer(make_dlrm(dataset, interaction="fm"), dataset, config, tmp_path / "run").fit()
    assert summary["samples"] == 10_000
    assert summary["best_samples"] == 0
    assert summary["auc"] == 1.0  # of the last weights


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs Linux's limits on file sizes")
def test_a_full_disk_is_one_line_and_keeps_earlier_checkpoints(tmp_path: Path, click_log: Dataset) -> None:
    arguments = command(tmp_path / "run", click_log.folder, "--epochs", "2")
    assert main([*arguments[:-2], "--epochs", "1"]) == 0
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("samples-*"))
    program = (
        "import resource, sys; from dlrm.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("recforge: error: ")
    assert set(saved) <= {path.name for path in (tmp_path / "run" / "checkpoints").glob("samples-*")}
    assert main(arguments) == 0

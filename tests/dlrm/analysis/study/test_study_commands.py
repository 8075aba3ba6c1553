"""Studies of the real training loop: killed with SIGKILL in the middle and repeated, they end as one left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlrm.cli import main
from dlrm.data.dataset import Dataset
from dlrm.recipes import RECIPES

IMPORTED = (
    *("dlrm.training.trainer", "dlrm.data.provide", "torch.utils.tensorboard", "optuna"),
    *(f"dlrm.analysis.study.{name}" for name in ("policy_runs", "batch_size_page", "learning_rate_page")),
)
SMALL = (
    *("--model.dim", "4", "--model.bottom", "8", "--model.top", "8", "--step.threads", "1", "--shuffle"),
    *("--tables.learning-rate", "0.5", "--dense-schedule.warmup-samples", "0", "--evaluation.batch-size", "4096"),
)


class Study:
    """A study's command that can be started again and again in one folder, and killed."""

    def __init__(self, folder: Path, argv: list[str], commands: Any) -> None:
        self.folder, self.commands = folder, commands
        self.errors = folder.with_suffix(".err")
        self.argv = ["study", *argv, *SMALL, "--output", str(folder)]

    def kill_when(self, ready: Callable[[], bool]) -> None:
        process = self.commands.start(self.argv, self.errors)
        deadline = time.monotonic() + 90
        while not ready():
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        assert self.commands.wait() == -signal.SIGKILL

    def finish(self) -> None:
        self.commands.start(self.argv, self.errors)
        assert self.commands.wait() == 0, self.errors.read_text()

    def trials(self) -> list[dict[str, Any]]:
        path = self.folder / "trials.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def without_times(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in trials]


@pytest.mark.long
def test_a_batch_size_study_killed_twice_ends_as_one_left_alone(
    tmp_path: Path, click_log: Dataset, commands: Any
) -> None:
    argv = ["batch-size", "synthetic", "--data", str(click_log.folder), "--batches", "1024", "4096", "--trials", "1"]
    argv += ["--repeats", "1", "--evaluations", "4", "--space", "dense.learning_rate=1e-3:0.1"]
    whole = Study(tmp_path / "whole", argv, commands)
    whole.finish()
    killed = Study(tmp_path / "killed", argv, commands)
    killed.kill_when(lambda: len(killed.trials()) >= 1)
    before = killed.trials()
    # In the middle of a run, which goes on from its last checkpoint.
    killed.kill_when(lambda: any((killed.folder / "runs" / "4096").glob("*/metrics.jsonl")))
    assert 1 <= len(before) < len(killed.trials()) < len(whole.trials())
    killed.finish()
    assert killed.trials()[: len(before)] == before
    assert without_times(killed.trials()) == without_times(whole.trials())
    names = [trial["trial"] for trial in whole.trials()]
    assert len(names) == len(set(names))
    assert {"goal", "1024/0", "4096/0"} <= set(names)
    results = [json.loads((study.folder / "result.json").read_text()) for study in (killed, whole)]
    assert results[0] == results[1]
    assert results[0]["goal"] == whole.trials()[0]["goal"]
    reached = [trial for trial in whole.trials()[1:] if trial["samples"] is not None]
    assert reached
    assert all(trial["course"][-1][1] >= results[0]["goal"] for trial in reached)
    assert "which batch size?" in (killed.folder / "report.html").read_text(encoding="utf-8")
    assert not list(killed.folder.glob("runs/*/*/checkpoints"))


def test_a_learning_rate_study_ranks_the_planted_policy_first_after_a_kill(
    tmp_path: Path, click_log: Dataset, commands: Any
) -> None:
    dead = "dead=--dense.learning-rate 1e-9 --tables.learning-rate 1e-9"
    argv = ["learning-rate", "synthetic", "--data", str(click_log.folder), "--policies", "range-test", "--seeds", "1"]
    argv += ["--own", dead, "alive=--dense.learning-rate 0.02", "--factors", "1", "--evaluations", "3"]
    argv += ["--step.global-batch-size", "256"]
    study = Study(tmp_path / "study", argv, commands)
    study.kill_when(lambda: len(study.trials()) >= 2)
    before = study.trials()
    study.finish()
    trials = study.trials()
    assert trials[: len(before)] == before
    names = [trial["trial"] for trial in trials]
    assert names == ["range-test/explore", "range-test/seed-1", "dead/seed-1", "alive/seed-1"]
    result = json.loads((study.folder / "result.json").read_text())
    best, *_, last = result["policies"]
    assert last["policy"] == "dead"
    assert best["value"] > last["value"] + 0.02
    by_name = {trial["trial"]: trial for trial in trials}
    explored = by_name["range-test/explore"]
    assert by_name["range-test/seed-1"]["factor"] == explored["suggested"] < explored["largest"]
    rates = by_name["alive/seed-1"]["rates"]
    assert rates[-1][1] == 12_000
    assert rates[-1][0] == pytest.approx(12_000 / 256, rel=0.05)
    assert {rate[2] for rate in rates} == {0.02}
    assert 0.5 < by_name["alive/seed-1"]["confidence"] < 1
    assert (study.folder / "runs" / "alive" / "seed-1" / "path.npy").is_file()
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    assert f"{best['value']:.4f}" in page
    assert 'data-plot="paths"' in page


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["batchsize", "synthetic"], "recforge study: expected one of batch-size, learning-rate, .*, got 'batchsize'"),
        (["batch-size", "synthetic", "--ranks", "2"], "--ranks: expected none in a study"),
        (["learning-rate", "synthetic", "--time-limit-seconds", "9"], "--time-limit-seconds: expected none in a study"),
        (["learning-rate", "synthetic", "--scale-from", "256"], "--scale-from: expected none in a study"),
        (["batch-size", "synthetic", "--branch-from", "x"], "--branch-from: expected none in a study"),
        (["batch-size", "synthetic", "--trials", "0"], "--trials: expected at least 1, got 0"),
        (["batch-size", "nothing"], "expected a recipe"),
        (["learning-rate", "synthetic", "--factors", "-1"], "--factors: expected different numbers above 0"),
        (["learning-rate", "synthetic", "--range-share", "2"], "--range-share: expected a share"),
    ],
)
def test_what_cannot_be_studied_is_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(words, lines[0])


def test_usage_names_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 2
    assert main(["study", "--help"]) == 0
    assert main(["study", "batch-size", "--help"]) == 0
    said = capsys.readouterr().out
    assert {"batch-size", "learning-rate"} <= set(said.split())
    assert {"--batches", "--goal"} <= set(said.split()), "flags of its own without a recipe too"
    assert "criteo-kaggle" in said
    with pytest.raises(SystemExit):
        main(["study", "curvature", "--help"])
    assert "RUN [RUN2]" in capsys.readouterr().out
    assert "recforge study batch-size RECIPE --help" in said


def test_what_a_configuration_has_is_refused_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES["synthetic"]
    monkeypatch.setitem(RECIPES, "mine", replace(recipe, config=replace(recipe.config, scale_from=256)))
    assert main(["study", "batch-size", "mine"]) == 2
    assert "--scale-from: expected none in a study" in capsys.readouterr().err


def test_flags_are_read_without_torch() -> None:
    program = textwrap.dedent(
        """
        import sys
        from dlrm.cli import main
        for kind in sys.argv[1:]:
            try:
                main(["study", kind, "synthetic", "--help"])
            except SystemExit as stop:
                assert not stop.code
            print("next study")
        assert not {"torch", "optuna", "plotly"} & set(sys.modules), "imported for --help"
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "batch-size", "learning-rate"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for said in result.stdout.split("next study")[:2]:
        assert "--evaluations" in said
        assert "study options" in said, "a group of their own"
        assert "studies/" in said
        assert not {"--ranks", "--scale-from", "--branch-from", "--time-limit-seconds"} & set(said.split())

"""`recforge study curvature` on the folders of real runs: it goes on where it was, compares two, and writes a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dlrm.analysis.curvature import trials
from dlrm.analysis.curvature.command import run_curvature, study_curvature
from dlrm.analysis.curvature.flags import CurvatureConfig
from dlrm.analysis.study.study_folder import read_trials
from dlrm.config import EvaluationConfig, GuardConfig, ModelConfig, RunConfig, StepConfig
from dlrm.data.dataset import Dataset
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.recipes import find_recipe
from dlrm.training.command import train

SMALL = {"samples": 200, "steps": 6, "probes": 2, "points": 7, "grid": 3, "threads": 1, "sharpness": (1e-3,)}


@pytest.fixture(scope="module")
def runs(click_log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one network, of a small and of a large batch."""
    folder = tmp_path_factory.mktemp("runs")
    for name, size in (("small", 200), ("large", 3000)):
        config = RunConfig(
            data=click_log.folder,
            output=folder / name,
            model=ModelConfig(dim=4, bottom=(8,), top=(8,)),
            dense=DenseOptimizerConfig(name="adam", learning_rate=0.01),
            step=StepConfig(global_batch_size=size, threads=1),
            evaluation=EvaluationConfig(every_samples=100_000, test_best=False),
            guards=GuardConfig(chance_evaluations=0),
        )
        train("synthetic", find_recipe("synthetic"), config)
    return folder / "small", folder / "large"


def test_two_runs_are_compared_on_a_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    config = CurvatureConfig(run=runs[0], second=runs[1], output=tmp_path / "study", **SMALL)
    page = study_curvature(config, quiet=True).read_text()
    records = read_trials(tmp_path / "study")
    assert len(records) == 2 * (1 + 2 + 1 + 1 + 3) + 2
    for number in (1, 2):
        extremes = records[f"{number}/extremes"]
        assert extremes["smallest"] < extremes["largest"]
        middle = records[f"{number}/landscape/row-1"]["losses"][1]
        assert records[f"{number}/curve"]["losses"][3] == pytest.approx(middle) == pytest.approx(extremes["loss"])
    line = records["line/train"]["losses"]  # -1, -.5, 0, .5, 1, 1.5, 2
    assert line[2] == pytest.approx(records["1/extremes"]["loss"])
    assert line[4] == pytest.approx(records["2/extremes"]["loss"])
    assert records["line/valid"]["losses"][2] != line[2]
    assert len(line) == 7
    for told in ("run 1 (batch 200)", "run 2 (batch 3,000)", "depend on how weights are scaled", str(runs[1])):
        assert told.lower() in page.lower()
    for chart in ("density", "curve", "line", "landscape-run-1", "landscape-run-2"):
        assert f'data-plot="{chart}"' in page


def test_a_study_that_was_stopped_computes_only_what_is_missing(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CurvatureConfig(run=runs[0], output=tmp_path / "whole", **SMALL)
    study_curvature(config, quiet=True)
    again = replace(config, output=tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(trials, "measure_sharpness", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            study_curvature(again, quiet=True)
    assert list(read_trials(again.folder)) == ["1/extremes", "1/density/probe-0", "1/density/probe-1"]
    with monkeypatch.context() as patch:  # what is there is not computed again
        patch.setattr(trials, "find_extremes", None)
        patch.setattr(trials, "probe_spectrum", None)
        study_curvature(again, quiet=True)

    def values(folder: Path) -> dict[str, dict[str, object]]:
        return {
            name: {key: value for key, value in record.items() if key != "seconds"}
            for name, record in read_trials(folder).items()
        }

    assert values(again.folder) == values(config.folder)


def test_another_checkpoint_is_another_study(runs: tuple[Path, Path], tmp_path: Path) -> None:
    few = SMALL | {"probes": 0, "grid": 0, "points": 0, "sharpness": (), "steps": 3}
    page = study_curvature(CurvatureConfig(run=runs[0], output=tmp_path / "study", **few), quiet=True).read_text()
    assert "data-plot" not in page.split("<main>")[1].split("<script>")[0]
    with pytest.raises(ValueError, match="holds a study with run 1 = "):
        study_curvature(CurvatureConfig(run=runs[1], output=tmp_path / "study", **few), quiet=True)


def test_data_of_another_log_are_refused(runs: tuple[Path, Path], make_dataset, tmp_path: Path) -> None:
    import numpy as np

    other = make_dataset(np.array([0, 1] * 50), np.arange(100) % 10)
    config = CurvatureConfig(run=runs[0], data=other.folder, output=tmp_path / "study", **SMALL)
    with pytest.raises(ValueError, match=r"--data: expected the data that .*small was trained on, got others"):
        study_curvature(config, quiet=True)
    with pytest.raises(ValueError, match=r"--data: expected the prepared dataset of .*small, found none in .*gone"):
        study_curvature(replace(config, data=tmp_path / "gone"), quiet=True)


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="expected the folder of a run or a checkpoint"):
        run_curvature([str(tmp_path)])
    assert run_curvature([]) == 2
    assert "RUN [RUN2]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--samples: expected at least 1, got 0"):
        run_curvature([str(tmp_path), "--samples", "0"])


def test_settings_are_written_beside_the_trials(runs: tuple[Path, Path], tmp_path: Path) -> None:
    few = SMALL | {"probes": 0, "grid": 0, "points": 0, "sharpness": (), "steps": 3}
    study_curvature(CurvatureConfig(run=runs[0], output=tmp_path / "study", weights="all", **few), quiet=True)
    settings = json.loads((tmp_path / "study" / "study.json").read_text())
    assert (settings["kind"], settings["weights"], settings["samples"]) == ("curvature", "all", 200)
    every = read_trials(tmp_path / "study")["1/extremes"]["num_weights"]
    study_curvature(CurvatureConfig(run=runs[0], output=tmp_path / "dense", **few), quiet=True)
    assert read_trials(tmp_path / "dense")["1/extremes"]["num_weights"] < every

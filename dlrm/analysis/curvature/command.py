"""`recforge study curvature`: how the loss is curved around a run's weights, or around two runs' and between them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dlrm.analysis.curvature.flags import CurvatureConfig
from dlrm.analysis.study.study_folder import StudyFolder
from dlrm.cli import parse
from dlrm.this_machine import count_cores

if TYPE_CHECKING:
    from dlrm.analysis.curvature.sampled_model import Solution
    from dlrm.analysis.curvature.trials import Terrain
    from dlrm.checkpoints.checkpoint import Restored

# What has no say in the result of a trial; runs count by their checkpoints.
PLACES = ("run", "second", "output", "data", "threads", "device")


def run_curvature(argv: list[str]) -> int:
    """Study the runs that `argv` names, and write a page about them."""
    if not argv:
        print("usage: recforge study curvature RUN [RUN2] [--output FOLDER] ...   (--help lists every flag)")
        return 2
    config = parse(
        CurvatureConfig,
        argv,
        program="recforge study curvature",
        description="Look at the loss around a run's weights: eigenvalues, sharpness, landscapes, and the line to "
        "another run's.",
    )
    print(study_curvature(config))
    return 0


def study_curvature(config: CurvatureConfig, *, quiet: bool = False) -> Path:
    """Compute what has not been computed yet, and return where the page lies.

    Args:
        config: of the study.
        quiet: show no progress bar.

    Raises:
        ValueError: a run's folder holds no checkpoint or no model, or two runs are not of the same network and data.
    """
    import torch

    from dlrm.analysis.curvature.page import write_curvature_page
    from dlrm.checkpoints.find_run import open_run

    torch.set_num_threads(config.threads or count_cores())
    opened = [open_run(run, best=config.best) for run in config.runs]
    for line in (line for restored, _ in opened for line in restored.skipped):
        print(f"recforge: {line}", file=sys.stderr)
    terrain = _open_terrain(config, opened)
    trials = list(terrain.trials())
    with StudyFolder(
        config.folder, kind="curvature", settings=_settings(config, terrain), total=len(trials), quiet=quiet
    ) as study:
        records = {name: study.trial(name, compute) for name, compute in trials}
        return write_curvature_page(study.folder, config, [described for _, described in opened], records)


def _open_terrain(config: CurvatureConfig, opened: Sequence[tuple[Restored, dict[str, Any]]]) -> Terrain:
    from dlrm.analysis.curvature.sample import draw_sample
    from dlrm.analysis.curvature.sampled_model import (
        SampledModel,
        check_same_architecture,
        read_solution,
        read_tables,
    )
    from dlrm.analysis.curvature.trials import LINE_SPLITS, Terrain
    from dlrm.data.dataset import DESCRIPTION, Dataset
    from dlrm.training.train_step import choose_device

    described = [run for _, run in opened]
    tables = {name: table["features"] for name, table in read_tables(described[0]).items()}
    if config.second is not None:
        check_same_architecture(described[0], described[1], (config.run, config.second))
    folder = config.data or Path(described[0].get("dataset") or "")
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(
            f"--data: expected the prepared dataset of {config.run}, found none in {folder}; say where it is"
        )
    dataset = Dataset(folder)
    for run, (restored, _) in zip(config.runs, opened, strict=True):
        if restored.state["progress"]["dataset"] != dataset.fingerprint:
            raise ValueError(f"--data: expected the data that {run} was trained on, got others in {dataset.folder}")
    splits = [split for split in LINE_SPLITS if dataset.rows(split)] if config.second is not None else ["train"]
    sample = draw_sample(dataset, tables, splits=splits, samples=config.samples, seed=config.seed)
    device = choose_device(config.device)
    model = SampledModel(described[0], sample).to(device)
    solutions = [read_solution(restored.state, run, sample) for restored, run in opened]
    return Terrain(config=config, model=model, solutions=solutions, sample=sample.to(device))


def _settings(config: CurvatureConfig, terrain: Terrain) -> dict[str, Any]:
    """Return what decides the result of each trial."""
    prints = {f"run {number}": fingerprint(its) for number, its in enumerate(terrain.solutions, start=1)}
    return {name: value for name, value in asdict(config).items() if name not in PLACES} | prints


def fingerprint(solution: Solution) -> str:
    """Return a checksum of weights, which tells one checkpoint from another wherever it lies."""
    digest = xxhash.xxh3_64()
    for name in sorted(solution):
        digest.update(name.encode() + solution[name].contiguous().numpy().tobytes())
    return digest.hexdigest()

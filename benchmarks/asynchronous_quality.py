"""What do asynchronous trainers cost in AUC against one synchronous run on the same samples, and how stale may rows be?

Each run is a whole one of the command line on the built-in synthetic log: `recforge train` once for each seed, then
`recforge ps up` with some trainers that go as fast as they can, then with 4 trainers and a bound on staleness, from
lock-step to none. A gap is that to the synchronous run of the same seed; half a 95 % confidence interval stands beside
each mean over seeds (`_ci`). `--figure` draws each run's gap over the staleness that was observed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = "synthetic"
BOUNDS: tuple[int | None, ...] = (0, 1, 4, 16, 64, None)
CONFIDENCE = 0.95


def main() -> None:
    """Train, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/asynchronous_quality"), help="what was trained is kept"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind: seeds 0, 1, ...")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--trainers", nargs="*", type=int, default=[1, 2, 4, 8], help="that go as fast as they can")
    parser.add_argument("--figure", type=Path, help="an HTML page to write")
    parser.add_argument("--bounds", nargs="*", type=_bound, default=list(BOUNDS), help="bounds on staleness, or none")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of all runs")
    arguments = parser.parse_args()
    runs = _Runs(arguments.folder, arguments.shards, arguments.flags)
    seeds = range(arguments.seeds)
    synchronous = [runs.synchronous(seed)["auc"] for seed in seeds]
    result: dict[str, Any] = {"seeds": arguments.seeds, "auc_synchronous": statistics.mean(synchronous)}
    points: dict[str, list[tuple[float, float]]] = {}
    for trainers in arguments.trainers:
        found = [runs.asynchronous(seed, trainers, None) for seed in seeds]
        result |= _compare(f"{trainers}_trainers", found, synchronous)
        points[f"{trainers} trainers, free"] = _place(found, synchronous)
    result["by_staleness"] = []
    for bound in arguments.bounds:
        found = [runs.asynchronous(seed, 4, bound) for seed in seeds]
        result["by_staleness"].append({"bound": bound} | _compare("4_trainers", found, synchronous))
        if bound is not None:
            points[f"4 trainers, at most {bound} ahead"] = _place(found, synchronous)
    if arguments.figure is not None:
        draw(points, arguments.figure)
    print(json.dumps(result))


def draw(points: dict[str, list[tuple[float, float]]], page: Path) -> None:
    """Draw (staleness, gap) of runs by their kind."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for name, placed in points.items():
        staleness, gaps = zip(*placed, strict=True) if placed else ((), ())
        figure.add_scatter(x=staleness, y=gaps, mode="markers", name=name, marker={"size": 10, "opacity": 0.8})
    figure.add_hrect(y0=-0.003, y1=0.003, fillcolor="gray", opacity=0.12, line_width=0)
    figure.add_hline(y=0, line_width=1)
    figure.update_layout(
        template="plotly_white",
        xaxis={
            "title": "other pushes that a table had seen between a gradient's pull and its push, mean",
            "rangemode": "tozero",
        },
        yaxis={"title": "test AUC less that of the synchronous run of the same seed", "tickformat": ".3f"},
        legend={"orientation": "h", "y": -0.2},
    )
    figure.write_html(page)


def _bound(text: str) -> int | None:
    return None if text == "none" else int(text)


def _compare(name: str, found: list[dict[str, Any]], synchronous: list[float]) -> dict[str, float]:
    from scipy import special

    gaps = [run["auc"] - auc for run, auc in zip(found, synchronous, strict=True)]
    compared = {f"auc_{name}": statistics.mean(run["auc"] for run in found), f"gap_{name}": statistics.mean(gaps)}
    if len(gaps) > 1:
        quantile = float(special.stdtrit(len(gaps) - 1, (1 + CONFIDENCE) / 2))  # Student's t
        compared[f"gap_{name}_ci"] = quantile * statistics.stdev(gaps) / math.sqrt(len(gaps))
    if all("mean_staleness" in run for run in found):
        compared[f"mean_staleness_{name}"] = statistics.mean(run["mean_staleness"] for run in found)
    return compared


def _place(found: list[dict[str, Any]], synchronous: list[float]) -> list[tuple[float, float]]:
    return [
        (run["mean_staleness"], run["auc"] - auc)
        for run, auc in zip(found, synchronous, strict=True)
        if "mean_staleness" in run
    ]


class _Runs:
    """Whole runs, each in a folder of its own, which is not trained again once it has a summary."""

    def __init__(self, folder: Path, shards: int, flags: list[str]) -> None:
        self._folder, self._shards, self._flags = folder, shards, flags

    def synchronous(self, seed: int) -> dict[str, Any]:
        return self._run(f"synchronous-{seed}", ["train", RECIPE, "--seed", str(seed), "--evaluation.no-test-best"])

    def asynchronous(self, seed: int, trainers: int, bound: int | None) -> dict[str, Any]:
        counts = ["--shards", str(self._shards), "--trainers", str(trainers)]
        command = ["ps", "up", RECIPE, *counts, "--seed", str(seed), "--servers.staleness", str(bound)]
        return self._run(f"{trainers}-trainers-{bound}-{seed}", command)

    def _run(self, name: str, command: list[str]) -> dict[str, Any]:
        output = self._folder / name
        summary = output / "summary.json"
        if not summary.is_file():
            program = [sys.executable, "-m", "deploy.cli", *command, "--output", str(output), *self._flags]
            subprocess.run(program, check=True, stdout=sys.stderr)
        read: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        return read


if __name__ == "__main__":
    main()

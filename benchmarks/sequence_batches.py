"""How much quality do sequence recommenders have at each batch size, with and without what MCLRec adds?

Methods of `benchmarks.sequence_methods`, each with its first setting, see every training sample as often at every batch
size, and update the encoder once a batch: of MCLRec this is the form of the paper, as the three steps of its code would
update it twice. The learning rate is that of batch 256, scaled by the square root, as Adam asks for. `--figure` draws
NDCG@20 of the test split, all items ranked but those that the user has seen, over the batch size.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from benchmarks.sequence_methods import METHODS, Flags, schedule
from benchmarks.sequence_quality import count_samples, summarise
from benchmarks.sequence_runs import Run, SequenceRuns

DRAWN = "filtered/ndcg@20"


def main() -> None:
    """Train, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="sequences, as `recforge train` takes them")
    parser.add_argument("--folder", type=Path, default=Path("runs/sequence_batches"), help="what was trained is kept")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["mclrec-two-step", "cl4srec", "sasrec"])
    parser.add_argument("--batches", nargs="*", type=int, default=[32, 64, 128, 256, 512])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--figure", type=Path, help="an HTML page to write")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="further flags of all runs; none of the schema"
    )
    arguments = parser.parse_args()
    shared = (
        *("--evaluation.patience", "None"),
        *schedule(arguments.epochs * count_samples(arguments.data), end=0.01),
        *("--scale-from", "256", "--rule", "sqrt"),
        *arguments.flags,
    )
    runs = SequenceRuns(arguments.folder, arguments.data, arguments.workers)
    cases = list(itertools.product(arguments.methods, arguments.batches, range(arguments.seeds)))
    found = dict(zip(cases, runs.all([_run(*case, shared, arguments.epochs) for case in cases]), strict=True))
    result = {
        name: {
            str(size): summarise([found[name, size, seed] for seed in range(arguments.seeds)])
            for size in arguments.batches
        }
        for name in arguments.methods
    }
    if arguments.figure is not None:
        draw(result, arguments.figure)
    print(json.dumps(result))


def _run(name: str, size: int, seed: int, shared: Flags, epochs: int) -> Run:
    method = METHODS[name]
    own = ("--step.global-batch-size", str(size), "--seed", str(seed))
    return Run(f"{name}-{size}-{seed}", method.recipe, (*method.flags, *method.settings[0], *shared, *own), epochs)


def draw(result: dict[str, dict[str, dict[str, float]]], page: Path) -> None:
    """Draw each method's quality over the batch size."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for name, by_size in result.items():
        values = list(by_size.values())
        spread = {"array": [each.get(f"{DRAWN}_std", 0.0) for each in values], "visible": f"{DRAWN}_std" in values[0]}
        heights = [each[DRAWN] for each in values]
        figure.add_scatter(x=list(by_size), y=heights, name=name, mode="lines+markers", error_y=spread)
    figure.update_layout(
        template="plotly_white",
        xaxis={"title": "samples in a batch", "type": "category"},
        yaxis={"title": "NDCG@20 of the test split, seen items left out", "rangemode": "tozero"},
        legend={"orientation": "h", "y": -0.2},
    )
    figure.write_html(page)


if __name__ == "__main__":
    main()

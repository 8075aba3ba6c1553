"""Which recommender of sequences ranks best, each tuned alike on validation, and what do the contrasts add?

Each method of `benchmarks.sequence_methods` is trained with each of its settings and seed 0, all the way or for
`--trial-epochs`; the one of the best validation MRR@10 is trained to the end, and with the other seeds too. All get the
same batches, epochs and schedule. What is printed is of the test split, where each run's best checkpoint by validation
ranks all items, once with and once without those that the user has seen: means over seeds, and their standard
deviations (`_std`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.sequence_methods import METHODS, Flags, schedule
from benchmarks.sequence_runs import Found, Run, SequenceRuns

KINDS = ("unfiltered", "filtered")
SHOWN = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20")


def main() -> None:
    """Train, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="sequences, as `recforge train` takes them")
    parser.add_argument("--folder", type=Path, default=Path("runs/sequence_quality"), help="what was trained is kept")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of a method's best setting: seeds 0, 1, ...")
    parser.add_argument("--settings", type=int, default=3, help="of each method, that are tried with seed 0")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--trial-epochs", type=int, help="after which settings are compared; --epochs where not given")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="further flags of all runs; none of the schema"
    )
    arguments = parser.parse_args()
    trial_epochs = arguments.epochs if arguments.trial_epochs is None else arguments.trial_epochs
    if not 1 <= trial_epochs <= arguments.epochs:
        parser.error(f"--trial-epochs: expected 1 to {arguments.epochs} (--epochs), got {trial_epochs}")
    shared = (
        *("--evaluation.patience", "None"),
        *schedule(arguments.epochs * count_samples(arguments.data), end=0.01),
        *arguments.flags,
    )
    runs = SequenceRuns(arguments.folder, arguments.data, arguments.workers)
    result: dict[str, Any] = {"epochs": arguments.epochs, "trial_epochs": trial_epochs, "seeds": arguments.seeds}
    for name in arguments.methods:
        settings = METHODS[name].settings[: arguments.settings]
        tried = runs.all([_run(name, number, 0, shared, trial_epochs) for number in range(len(settings))])
        best = max(range(len(settings)), key=lambda number: tried[number].valid)
        chosen = [_run(name, best, seed, shared, arguments.epochs) for seed in range(arguments.seeds)]
        result[name] = {"setting": " ".join(settings[best]), **summarise(runs.all(chosen))}
    print(json.dumps(result))


def count_samples(data: Path) -> int:
    """Return how many training samples an epoch of a file has."""
    from contrastive.data.provide_sequences import provide_sequences
    from contrastive.data.sequence_schema import SequenceSchema

    return provide_sequences(SequenceSchema(), data, is_synthetic=False).rows("train")


def _run(name: str, number: int, seed: int, shared: Flags, epochs: int) -> Run:
    method = METHODS[name]
    flags = (*method.flags, *method.settings[number], *shared, "--seed", str(seed))
    return Run(f"{name}-{number}-{seed}", method.recipe, flags, epochs)


def summarise(found: list[Found]) -> dict[str, float]:
    """Return means over runs, and standard deviations where there are several."""
    values: dict[str, list[float]] = {"valid_mrr@10": [run.valid for run in found]}
    values["best_at_samples"] = [run.best_at for run in found]
    values |= {f"{kind}/{name}": [run.ranked[f"{kind}/{name}"] for run in found] for kind in KINDS for name in SHOWN}
    means = {name: round(statistics.mean(each), 5) for name, each in values.items()}
    if len(found) > 1:
        means |= {f"{name}_std": round(statistics.stdev(each), 5) for name, each in values.items()}
    return means | {"seconds": round(statistics.mean(run.seconds for run in found))}


if __name__ == "__main__":
    main()

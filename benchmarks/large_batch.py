"""What does a 4 or 16 times larger batch cost in AUC, and how much of it does each way to train with it win back?

Everything starts from one setting that was tuned for a small batch: 256 on the synthetic log, 64 on MovieLens-100K.
What is tuned is tuned on validation rows, with as many trials for each arm; `--tune` repeats that. Without it, the
settings that were found are trained with several seeds and measured on the test rows. Where one arm of several is
chosen, as the best or as that of LAMB, the validation rows choose it. Half a 95 % confidence interval stands beside
each mean over seeds (`_ci`); a gap's is paired by test row and by seed.

What was trained is kept in a folder: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlrm.data.dataset import Dataset

ROWS = {"train": 1_000_000, "valid": 100_000, "test": 200_000}
SMALL_ROWS = {"train": 5_000, "valid": 1_000, "test": 2_000}
SMALL_BATCH = 32
VALID_SHARE, TEST_SHARE = 0.1, 0.2  # of MovieLens


def main() -> None:
    """Compare or tune, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", choices=("synthetic", "movielens-100k"), default="synthetic")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="that holds ml-100k/, for --log movielens-100k")
    parser.add_argument("--folder", type=Path, default=Path("runs/large_batch"), help="what was trained is kept here")
    parser.add_argument("--seeds", type=int, default=5, help="runs per arm: seeds 0, 1, ...")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="compare these alone, beside small_batch")
    parser.add_argument("--tune", nargs="+", metavar="ARM", help="search the settings of these arms instead")
    parser.add_argument("--trials", type=int, default=12, help="of a search")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--small", action="store_true", help="a log of a few thousand rows, to try the command")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from benchmarks.large_batch_comparison import Comparison
    from benchmarks.large_batch_runs import Runs
    from benchmarks.large_batch_settings import ARMS, LOGS, SMALL

    arms = ARMS[arguments.log]
    if unknown := {*(arguments.tune or ()), *(arguments.arms or ())} - set(arms):
        parser.error(f"expected arms among {', '.join(arms)}, got {', '.join(sorted(unknown))}")
    if arguments.log == "movielens-100k" and arguments.data is None:
        parser.error("--log movielens-100k: expected --data, the folder that holds ml-100k/, got nothing")
    folder = arguments.folder / (arguments.log + ("-small" if arguments.small else ""))
    runs = Runs(folder, _provide(arguments, folder / "data"))
    log = LOGS[arguments.log]
    if arguments.small:
        log = replace(log, batch_size=SMALL_BATCH)
    comparison = Comparison(log, runs, threads=arguments.threads)
    if arguments.tune:
        print(json.dumps({name: comparison.tune(name, arms[name], arguments.trials) for name in arguments.tune}))
        return
    chosen = {name: arm for name, arm in arms.items() if not arguments.arms or name in (SMALL, *arguments.arms)}
    print(json.dumps(comparison.compare(chosen, range(arguments.seeds))))


def _provide(arguments: argparse.Namespace, folder: Path) -> Dataset:
    """Make the data, once."""
    if arguments.log == "synthetic":
        from dlrm.data.synthetic import SyntheticConfig, generate

        rows = SMALL_ROWS if arguments.small else ROWS
        config = SyntheticConfig(num_train=rows["train"], num_valid=rows["valid"], num_test=rows["test"])
        return generate(config, folder, threads=arguments.threads)
    from dlrm.data.known import known_schema
    from dlrm.data.prepare import prepare
    from dlrm.data.schema import SplitConfig

    schema = known_schema(arguments.log)
    split = SplitConfig(by=schema.split.by, valid=VALID_SHARE, test=TEST_SHARE)
    return prepare(replace(schema, split=split), [arguments.data / "ml-100k"], folder, processes=1)


if __name__ == "__main__":
    main()

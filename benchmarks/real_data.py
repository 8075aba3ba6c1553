"""What AUC do the recipes for real rows reach over several seeds, and what does a logistic regression on their input?

FOLDER holds `criteo_kaggle/train_head_10000.tsv` and `ml-100k/`. Without `--folds` the recipes are run as
`recforge train` runs them, and measured on their test part. With it they are run on rolling chronological folds of the
training rows, on which the settings were chosen, and no test row is read into them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlrm.config import RunConfig
    from dlrm.data.dataset import Dataset

SOURCES = {
    "criteo_sample": ("criteo-kaggle-sample", "criteo_kaggle/train_head_10000.tsv"),
    "movielens": ("movielens-100k", "ml-100k"),
}
TEST_SHARE = 0.2
# Where a fold's training rows and the rows it is measured on end, as shares of all rows.
FOLDS = {
    "criteo_sample": ((0.4, 0.6), (0.5, 0.7), (0.6, 0.8), (0.7, 0.8)),
    "movielens": ((0.4, 0.56), (0.48, 0.64), (0.56, 0.72), (0.64, 0.8)),
}
INVERSE_PENALTY = {"criteo_sample": 0.03, "movielens": 1.0}  # of the logistic regressions, the best on the folds


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the folder of real rows")
    parser.add_argument("--seeds", type=int, default=5, help="runs per recipe and part: seeds 0, 1, ...")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--folds", action="store_true", help="measure on folds of the training rows, not on the test")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    result: dict[str, float | list[float]] = {"seeds": arguments.seeds}
    for name, (recipe, place) in SOURCES.items():
        per_seed, linear = [], []
        for share, dataset in _prepare_parts(name, arguments.data / place, arguments.folds):
            aucs = [_train(recipe, dataset, share, seed, arguments.threads) for seed in range(arguments.seeds)]
            per_seed.append(aucs)
            linear.append(_fit_logistic_regression(dataset, INVERSE_PENALTY[name]))
            print(f"{name}: {statistics.mean(aucs):.4f}, logistic regression {linear[-1]:.4f}", file=sys.stderr)
        means = [statistics.mean(aucs) for aucs in zip(*per_seed, strict=True)]
        deviation = statistics.stdev(means) if len(means) > 1 else 0.0
        result |= {f"{name}_auc": round(statistics.mean(means), 4), f"{name}_auc_deviation": round(deviation, 4)}
        result |= {f"{name}_auc_seed_{seed}": round(auc, 4) for seed, auc in enumerate(means)}
        result[f"{name}_logistic_regression_auc"] = round(statistics.mean(linear), 4)
    print(json.dumps(result))


def _prepare_parts(name: str, source: Path, folds: bool) -> Iterator[tuple[float, Dataset]]:
    """Yield the share of all rows that a part trains on, and the part itself."""
    from dlrm.data.known import known_schema
    from dlrm.data.prepare import prepare
    from dlrm.data.schema import SplitConfig

    schema = known_schema(SOURCES[name][0])
    for train_end, end in FOLDS[name] if folds else ((1 - TEST_SHARE, 1.0),):
        with tempfile.TemporaryDirectory() as folder:
            rows = _cut(source, end, Path(folder) / "source") if folds else source
            split = SplitConfig(by=schema.split.by, valid=0.0, test=1 - train_end / end)
            yield train_end, prepare(replace(schema, split=split), [rows], Path(folder) / "data", processes=1)


def _cut(source: Path, end: float, out: Path) -> Path:
    """Copy the oldest rows of a source, and what lies beside a MovieLens log."""
    out.mkdir()
    if source.is_file():
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        (out / source.name).write_text("".join(lines[: round(end * len(lines))]), encoding="utf-8")
        return out / source.name
    log = next(source.glob("*.inter"))
    header, *lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    column = [cell.partition(":")[0] for cell in header.strip().split("\t")].index("timestamp")
    lines.sort(key=lambda line: float(line.split("\t")[column]))
    (out / log.name).write_text(header + "".join(lines[: round(end * len(lines))]), encoding="utf-8")
    for suffix in (".user", ".item"):
        shutil.copy(log.with_suffix(suffix), out)
    return out


def _train(name: str, dataset: Dataset, share: float, seed: int, threads: int) -> float:
    from dlrm.recipes import RECIPES
    from dlrm.training.command import train

    recipe = RECIPES[name]
    config = recipe.config
    with tempfile.TemporaryDirectory() as output:
        config = replace(
            config,
            data=dataset.folder,
            output=Path(output) / "run",
            seed=seed,
            step=replace(config.step, threads=threads),
            **_shorten_schedules(config, share / (1 - TEST_SHARE)),
        )
        return float(train(name, recipe, config)["auc"])


def _shorten_schedules(config: RunConfig, factor: float) -> dict[str, Any]:
    """Make schedules that are as long as the run on all training rows fit a run on fewer."""
    return {
        name: replace(schedule, decay_samples=round(schedule.decay_samples * factor))
        for name in ("dense_schedule", "tables_schedule")
        for schedule in [getattr(config, name)]
    }


def _fit_logistic_regression(dataset: Dataset, inverse_penalty: float) -> float:
    """Return the AUC of a logistic regression on one column per id beside the numbers that the recipe gets."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    model = LogisticRegression(C=inverse_penalty, max_iter=1000).fit(*_to_matrix(dataset, "train"))
    inputs, labels = _to_matrix(dataset, "test")
    return float(roc_auc_score(labels, model.decision_function(inputs)))


def _to_matrix(dataset: Dataset, split: str) -> Any:
    import numpy as np
    from scipy import sparse

    from dlrm.data.dataset import Bags

    parts = [dataset.part(split, index) for index in range(len(dataset.info.splits[split]))]
    blocks = [sparse.csr_matrix(np.concatenate([part.numeric for part in parts]))]
    for feature in dataset.info.features:
        pieces = []
        for part in parts:
            ids = part.features[feature.name]
            bags = ids if isinstance(ids, Bags) else Bags(offsets=np.arange(len(ids) + 1), values=ids)
            shape = len(part.label), feature.num_rows
            pieces.append(sparse.csr_matrix((np.ones(len(bags.values)), bags.values, bags.offsets), shape=shape))
        blocks.append(sparse.vstack(pieces))
    return sparse.hstack(blocks).tocsr(), np.concatenate([part.label for part in parts])


if __name__ == "__main__":
    main()

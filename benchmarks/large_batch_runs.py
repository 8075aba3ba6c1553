"""Trains one setting with one seed, and keeps what came out, so that a comparison of many can be interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dlrm.diverged import DivergedError

if TYPE_CHECKING:
    from torch import nn

    from dlrm.config import RunConfig
    from dlrm.data.dataset import Dataset

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

FAILED = 0.5  # what a run that did not come to an end counts for
SCORED_AT_A_TIME = 16_384


@dataclass(frozen=True)
class Outcome:
    """What is kept of a run.

    Attributes:
        valid_auc: after the last step; `FAILED` of a run that has diverged.
        steps: that it took.
        test_scores: [rows of the test split]; None in a run that must not see them.
        error: in words, of one that has diverged.
    """

    valid_auc: float
    steps: int = 0
    test_scores: Floats | None = None
    error: str | None = None


class Runs:
    """Trains on one dataset, and remembers in a folder.

    Args:
        folder: `runs.jsonl` and the scores lie here.
        dataset: with splits train, valid and test.
    """

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.folder, self.dataset = folder, dataset
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "runs.jsonl"
        self._known = self._read_log()

    def run(self, name: str, config: RunConfig, *, test: bool = False) -> Outcome:
        """Train a configuration, or return what is remembered of it.

        Args:
            name: told in the log.
            config: with its seed.
            test: measure the test rows as well.
        """
        key = self._key(config, test=test)
        place = self.folder / f"{key}.npy"
        if key not in self._known:
            outcome = self._train(config, test=test)
            if outcome.test_scores is not None:
                np.save(place, outcome.test_scores)
            line = {"key": key, "name": name, "seed": config.seed, "valid_auc": outcome.valid_auc}
            line |= {"steps": outcome.steps}
            self._known[key] = line | ({"error": outcome.error} if outcome.error else {})
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(self._known[key]) + "\n")
        known = self._known[key]
        scores = np.load(place) if place.is_file() else None
        return Outcome(known["valid_auc"], known.get("steps", 0), scores, known.get("error"))

    def _read_log(self) -> dict[str, dict[str, Any]]:
        """Return what was trained, by key, and forget a last line that was not written to its end."""
        text = self._log.read_text(encoding="utf-8") if self._log.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._log.write_text(whole, encoding="utf-8")
        return {line["key"]: line for line in map(json.loads, whole.splitlines())}

    def labels(self, split: str) -> Floats:
        """Return the labels of a split [rows]."""
        from dlrm.data.dataset import LABEL

        rows = np.arange(self.dataset.rows(split))
        return np.asarray(self.dataset.column(split, LABEL, rows), dtype=np.float32)

    def _key(self, config: RunConfig, *, test: bool) -> str:
        import xxhash

        from dlrm.config import RunConfig
        from dlrm.training.run_config import leaves

        usual = dict(leaves(asdict(RunConfig())))
        # What is left as it is has no part in it, so that a setting that is added later changes no key.
        own = {name: value for name, value in leaves(asdict(config)) if value != usual.get(name)}
        return xxhash.xxh3_64_hexdigest(f"{self.dataset.fingerprint} {sorted(own.items())} {test}".encode())

    def _train(self, config: RunConfig, *, test: bool) -> Outcome:
        with tempfile.TemporaryDirectory() as output:
            try:
                with _silent():
                    model, valid_auc, steps = _fit(config, self.dataset, Path(output))
            except DivergedError as error:  # anything else is a mistake of ours, and no result
                return Outcome(FAILED, error=str(error))
        return Outcome(valid_auc, steps, score(model, self.dataset, "test") if test else None)


def score(model: nn.Module, dataset: Dataset, split: str) -> Floats:
    """Return a model's logits of all rows of a split."""
    import torch

    from dlrm.data.reader import Reader

    model.eval()
    reader = Reader(dataset, split)
    with torch.no_grad():
        batches = reader.batches(SCORED_AT_A_TIME, stop=reader.num_rows)
        return np.concatenate([model(batch).float().numpy() for batch in batches])


def _fit(config: RunConfig, dataset: Dataset, output: Path) -> tuple[nn.Module, float, int]:
    """Train to the end without a look at the test rows; return the model, its AUC on the valid split, and the steps."""
    import torch

    from dlrm.checkpoints.run_state import seed_generators
    from dlrm.data.dataset import Dataset
    from dlrm.model import build_dlrm
    from dlrm.training.trainer import Trainer

    splits = {name: parts for name, parts in dataset.info.splits.items() if name != "test"}
    training = Dataset(dataset.folder, replace(dataset.info, splits=splits))
    torch.set_num_threads(config.step.threads or 1)
    seed_generators(config.seed)
    model = build_dlrm(training.info, config.model, config.tables, config.small_tables, seed=config.seed, device="cpu")
    trainer = Trainer(model, training, config, output)
    auc = float(trainer.fit()["auc"])
    samples = steps = 0
    while samples < trainer.progress.samples:
        until_epoch_ends = trainer.reader.num_rows - samples % trainer.reader.num_rows
        samples += min(trainer.sizes.at(samples), until_epoch_ends)
        steps += 1
    return model, auc, steps


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield

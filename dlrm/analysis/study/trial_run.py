"""Trains one configuration as a trial of a study: the real training loop, quiet, in a folder of its own."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlrm.config import GuardConfig, RunConfig
from dlrm.diverged import DivergedError
from dlrm.recipes import Recipe
from dlrm.this_machine import count_cores
from dlrm.training.command import build_trainer
from dlrm.training.run_log import read_records

if TYPE_CHECKING:
    from dlrm.data.dataset import Dataset
    from dlrm.training.attachments import Attachment
    from dlrm.training.trainer import Trainer

    Watch = Callable[[Trainer], Sequence[Attachment]]

RUNS, LOG = "runs", "train.log"


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialRun:
    """What a trained trial left behind.

    Attributes:
        folder: of the run, with its metrics.jsonl; checkpoints are gone.
        summary: what `Trainer.fit` returned; None where the run diverged.
        diverged: why it was given up, "" if it was not.
        trainer: with the model as `fit` left it.
    """

    folder: Path
    summary: dict[str, Any] | None
    diverged: str
    trainer: Trainer

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return the run's records of a kind, `train` or `valid`, in the order of samples."""
        # Measurements at the very end bear their split's name too, and no seconds.
        return [r for r in read_records(self.folder) if r["kind"] == kind and "seconds" in r]


class TrialRunner:
    """Trains configurations of one recipe on its data, one after the other.

    Args:
        name: of the recipe.
        recipe: tells where the data come from.
        run: what the trials have in common; its device, threads and data are those of all.
        folder: of the study; each run has a folder in it.
    """

    def __init__(self, name: str, recipe: Recipe, run: RunConfig, folder: Path) -> None:
        import torch

        from dlrm.data.provide import provide_dataset
        from dlrm.training.train_step import check_compile, choose_device

        if run.step.compile:
            check_compile(choose_device(run.step.device), cuda_graphs=run.step.cuda_graphs)
        torch.set_num_threads(run.step.threads or count_cores())
        self.name, self.folder = name, folder
        self.dataset: Dataset = provide_dataset(recipe.source, run.data)
        for split in ("train", "valid"):
            if not self.dataset.rows(split):
                raise ValueError(f"{self.dataset.folder}: expected rows in the {split} split, got none")

    @property
    def epoch_samples(self) -> int:
        """Rows of the train split."""
        return self.dataset.rows("train")

    def run(self, name: str, config: RunConfig, watch: Watch | None = None) -> TrialRun:
        """Train a configuration; a run that was killed goes on from its last checkpoint.

        Guards are off, as a trial that learns nothing is a result too; a loss that is not finite ends it, and so do
        weights that an evaluation finds to be none.

        Args:
            name: of the trial; its folder has the same.
            config: of the run; its places are those of the study.
            watch: given the trainer, makes who else takes part in each step.

        Raises:
            ValueError: the configuration does not fit the data.
        """
        folder = self.folder / RUNS / name
        folder.mkdir(parents=True, exist_ok=True)
        gc.collect()  # tables of the trial before, before there are new ones
        config = replace(config, guards=GuardConfig(chance_evaluations=0, constant_prediction=False))
        with _quiet(folder / LOG):
            trainer = build_trainer(self.name, config, folder, self.dataset)
            if watch is not None:
                trainer.attachments.members += tuple(watch(trainer))
            summary, diverged = _fit(trainer)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return TrialRun(folder=folder, summary=summary, diverged=diverged, trainer=trainer)


def _fit(trainer: Trainer) -> tuple[dict[str, Any] | None, str]:
    try:
        return trainer.fit(), ""
    except DivergedError as error:
        return None, str(error)


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send what a run says of itself to a file; the study has a progress bar of its own."""
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        yield

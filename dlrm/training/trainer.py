"""The training loop: read, step, measure, save; it reads from top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlrm.config import TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.optim.dense import build_dense_optimizer
from dlrm.training.checkpoint import CheckpointStore
from dlrm.training.evaluate import evaluate, evaluate_true_probability
from dlrm.training.guards import LearningGuard, NonFiniteLossError, check_model_fits, check_segments
from dlrm.training.interrupt import StopRequest, only_run_in
from dlrm.training.metrics import MetricValues, is_at_chance
from dlrm.training.run_config import CONFIG, check_same_run, describe_run
from dlrm.training.run_log import RunLog, write_json
from dlrm.training.run_state import (
    load_model,
    load_random_state,
    seed_generators,
    take_model,
    take_random_state,
)
from dlrm.training.summary import describe_values, write_summary
from dlrm.training.train_step import ClickTask, TrainStep
from embeddings.allocation import keep_freed_memory
from embeddings.stopwatch import Stopwatch

HIGHER_IS_BETTER = {"auc": True, "logloss": False, "normalized_entropy": False}


@dataclass
class Progress:
    """How far a run has come; with weights, rows and random state, all that a resumed run needs."""

    samples: int = 0
    seconds: float = 0.0
    unlogged_loss: float = 0.0
    unlogged_samples: int = 0
    best: float | None = None
    best_samples: int = 0
    evaluations_without_gain: int = 0
    evaluations_at_chance: int = 0
    evaluated_samples: int = -1


class Trainer:
    """Trains a model on a prepared dataset; what it writes lies in `output`.

    Running it again on the folder of an unfinished run continues that run, from its last checkpoint, as if it had
    never stopped.

    Args:
        model: `model(batch)` gives logits [B]; `dlrm.model.DLRM` or any module.
        dataset: its train split is learned, its valid split steers, its test split is measured at the end.
        config: of the loop.
        output: the run's folder.
        recipe: a name for the run.

    Raises:
        ValueError: the model's tables do not suit the data, the training split is empty, or `output` holds another run.
    """

    def __init__(
        self, model: nn.Module, dataset: Dataset, config: TrainingConfig, output: Path | str, *, recipe: str = ""
    ) -> None:
        check_model_fits(model, dataset)
        check_segments(dataset, config.evaluation.segment_by)
        self.settings = describe_run(config, model, recipe)
        check_same_run(Path(output), self.settings)
        self.model, self.dataset, self.config, self.folder = model, dataset, config, Path(output)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.reader = Reader(dataset, "train", shuffle=config.shuffle, seed=config.seed)
        self.valid_reader = Reader(dataset, "valid") if dataset.rows("valid") else None
        self.total_samples = max(1, round(config.epochs * self.reader.num_rows))
        self.stopwatch = Stopwatch()
        self.optimizer = build_dense_optimizer(config.dense, model.named_parameters())
        self.step = TrainStep(
            ClickTask(model),
            self.optimizer,
            dense_schedule=config.dense_schedule,
            tables_schedule=config.tables_schedule,
            precision=config.step.precision,
            stopwatch=self.stopwatch,
            numeric_names=dataset.info.numeric,
        )
        if self.device.type == "cpu":
            keep_freed_memory()
        self.guard = LearningGuard(config.guards)
        # A model that has only begun to learn may still guess.
        warmup = max(config.dense_schedule.warmup_samples, config.tables_schedule.warmup_samples)
        self.first_judged_sample = max(warmup, self.total_samples // 10)
        self.progress = Progress()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", keep_last=config.checkpoint.keep_last)

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until a limit or a target is reached, and return what `summary.json` holds.

        Raises:
            ValueError: a guard stopped the run, and what was saved before is kept; or another process trains here.
            KeyboardInterrupt: the run was asked to stop; its state is saved, and the same command continues it.
        """
        with only_run_in(self.folder):
            return self._fit()

    def _fit(self) -> dict[str, Any]:
        seed_generators(self.config.seed)  # of dropout; a checkpoint brings its own state
        notes = self._restore()
        versions = {"dataset": str(self.dataset.folder), "torch": torch.__version__}
        write_json(self.folder / CONFIG, self.settings | versions)
        log = RunLog(self.folder, samples=self.progress.samples, total=self.total_samples)
        for note in notes:
            log.say(note)
        try:
            with StopRequest() as stop_request:
                why = self._loop(log, stop_request)
                self.checkpoints.wait()
                if why == "interrupted":
                    raise KeyboardInterrupt(
                        f"and saved after {self.progress.samples} samples; the same command continues"
                    )
            return self._finish(log, why)
        except NonFiniteLossError as error:
            told = error.with_what_is_kept(self._what_is_kept())
            log.record("stopped", self.progress.samples, {"why": str(told)})
            raise told from error
        except (ValueError, OSError, KeyboardInterrupt) as error:
            with contextlib.suppress(OSError):  # a full disk may be what stopped it
                log.record("stopped", self.progress.samples, {"why": str(error) or "interrupted"})
            raise
        finally:
            log.close()

    def _loop(self, log: RunLog, stop_request: StopRequest) -> str:
        config, progress = self.config, self.progress
        if (why := self._reason_to_stop()) is not None:  # a run that had ended is continued
            return why
        self.model.train()
        for batch in self._batches():
            before, after = progress.samples, progress.samples + len(batch)
            with self._timed():
                loss = self.step(batch.to(self.device) if self.device.type != "cpu" else batch, after)
            progress.samples = after
            progress.unlogged_loss += loss * len(batch)
            progress.unlogged_samples += len(batch)
            log.advance(len(batch), loss)
            if self._due(before, config.log_every_samples):
                self._log_training(log)
            asked_to_stop = stop_request.requested  # once, so that no request falls between saving and leaving
            stop_now = asked_to_stop or self._time_is_up()
            complaint, is_best, evaluated = None, False, False
            if self._due(before, config.evaluation.every_samples or self.reader.num_rows):
                complaint, is_best = self._evaluate(log)
                evaluated = True
            every = config.checkpoint.every_samples
            if stop_now or (self._due(before, every) if every else evaluated) or is_best:
                self._save(is_best=is_best)
            if complaint:
                self.checkpoints.wait()
                raise ValueError(complaint)
            if asked_to_stop:
                return "interrupted"
            if (why := self._reason_to_stop()) is not None:
                return why
        return "all epochs done"

    def _batches(self) -> Iterator[Any]:
        batches = self.reader.batches(
            self.config.step.global_batch_size, start=self.progress.samples, stop=self.total_samples
        )
        while True:
            with self._timed(), self.stopwatch.stage("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _due(self, before: int, every: int) -> bool:
        """Whether a multiple of `every`, or the end, lies between `before` and the samples seen now."""
        samples = self.progress.samples
        return samples // every > before // every or samples >= self.total_samples

    def _reason_to_stop(self) -> str | None:
        progress, evaluation = self.progress, self.config.evaluation
        if self._time_is_up():
            return f"time limit of {self.config.time_limit_seconds} seconds"
        if progress.evaluated_samples != progress.samples or progress.best is None:
            return None
        if evaluation.stop_at is not None and not self._is_better(evaluation.stop_at, progress.best):
            return f"{evaluation.metric} reached {evaluation.stop_at}"
        if evaluation.patience is not None and progress.evaluations_without_gain >= evaluation.patience:
            return f"no better {evaluation.metric} in {evaluation.patience} evaluations"
        return None

    def _time_is_up(self) -> bool:
        limit = self.config.time_limit_seconds
        return limit is not None and self.progress.seconds >= limit

    def _is_better(self, value: float, than: float) -> bool:
        return value > than if HIGHER_IS_BETTER[self.config.evaluation.metric] else value < than

    def _log_training(self, log: RunLog) -> None:
        progress = self.progress
        values = {
            "loss": progress.unlogged_loss / max(1, progress.unlogged_samples),
            "seconds": progress.seconds,
            "samples_per_second": progress.samples / max(progress.seconds, 1e-9),
            "dense_learning_rate": self.config.dense.learning_rate
            * self.config.dense_schedule.factor(progress.samples),
            "tables_learning_rate_factor": self.config.tables_schedule.factor(progress.samples),
        }
        log.record("train", progress.samples, values)
        progress.unlogged_loss, progress.unlogged_samples = 0.0, 0

    def _evaluate(self, log: RunLog) -> tuple[str | None, bool]:
        """Measure the valid split; return what the guard complains of, and whether this is the best so far."""
        if self.valid_reader is None:
            return None, False
        values = self._measure(self.valid_reader)
        progress, metric = self.progress, self.config.evaluation.metric
        value = float(getattr(values, metric))
        defined = not math.isnan(value)
        is_best = defined and (progress.best is None or self._is_better(value, progress.best))
        progress.evaluated_samples = progress.samples
        progress.evaluations_without_gain = 0 if is_best else progress.evaluations_without_gain + defined
        if progress.samples >= self.first_judged_sample:
            at_chance = is_at_chance(values.auc, values.positives, values.samples)
            progress.evaluations_at_chance = progress.evaluations_at_chance + 1 if at_chance else 0
        if is_best:
            progress.best, progress.best_samples = value, progress.samples
        measured = {"seconds": progress.seconds, "stage_seconds": dict(self.stopwatch.seconds)}
        log.record("valid", progress.samples, self._describe(values) | measured)
        log.say(
            f"after {progress.samples:,} samples: auc {values.auc:.4f}, logloss {values.logloss:.4f}, "
            f"calibration {values.calibration:.3f} on {values.samples:,} valid rows" + (" (best)" if is_best else "")
        )
        if values.undefined is not None:
            log.say(f"not every metric of the valid split is defined: {values.undefined}")
        return self.guard.complaint(values, progress.evaluations_at_chance), is_best

    def _measure(self, reader: Reader) -> MetricValues:
        evaluation = self.config.evaluation
        with self.stopwatch.stage("evaluation"):
            return evaluate(
                self.model,
                reader,
                batch_size=evaluation.batch_size,
                segment_by=evaluation.segment_by,
                precision=self.config.step.precision,
                device=self.device,
                directory=self.folder,
            )

    def _describe(self, values: MetricValues) -> dict[str, Any]:
        return describe_values(values, self.dataset, self.config.evaluation.segment_by)

    def _save(self, *, is_best: bool) -> None:
        with self.stopwatch.stage("checkpoint"):
            state = {
                **take_model(self.model),
                "dense_optimizer": self.optimizer.state_dict(),
                "progress": asdict(self.progress) | {"dataset": self.dataset.fingerprint},
                "stage_seconds": dict(self.stopwatch.seconds),
                "random": take_random_state(self.device),
            }
            self.checkpoints.save(state, samples=self.progress.samples, metric=self.progress.best, is_best=is_best)

    def _what_is_kept(self) -> str:
        with contextlib.suppress(ValueError):  # one that could not be written is not kept
            self.checkpoints.wait()
        saved = self.checkpoints.list()
        return f"the checkpoint after {saved[0].samples:,} samples is kept" if saved else "nothing was saved before"

    def _restore(self) -> list[str]:
        restored = self.checkpoints.restore_latest()
        if restored is None:
            return []
        state: dict[str, Any] = dict(restored.state)
        fingerprint = state["progress"].pop("dataset")
        if fingerprint != self.dataset.fingerprint:
            raise ValueError(
                f"{self.folder} was trained on other data than {self.dataset.folder}; choose another --output"
            )
        load_model(self.model, state)
        self.optimizer.load_state_dict(state["dense_optimizer"])
        self.progress = Progress(**state["progress"])
        self.stopwatch.seconds.update(state["stage_seconds"])
        load_random_state(state["random"], self.device)
        return [*restored.skipped, f"continuing after {self.progress.samples:,} samples"]

    def _finish(self, log: RunLog, why: str) -> dict[str, Any]:
        """Measure the test split with the best weights, and write `summary.json` and `tables.json`."""
        if self.config.evaluation.test_best and (best := self.checkpoints.restore_best()) is not None:
            load_model(self.model, best.state)
        split = next((name for name in ("test", "valid", "train") if self.dataset.rows(name)), "train")
        reader = Reader(self.dataset, split)
        values = self._measure(reader)
        truth = evaluate_true_probability(reader, directory=self.folder)
        progress = self.progress
        described = self._describe(values)
        log.record(split, progress.samples, described)
        course = {
            "split": split,
            "samples": progress.samples,
            "seconds": progress.seconds,
            "stopped": why,
            "best_samples": progress.best_samples,
            "stage_seconds": dict(self.stopwatch.seconds),
        }
        summary = write_summary(self.folder, self.model, described, truth, course)
        at_chance = is_at_chance(values.auc, values.positives, values.samples)
        chances = progress.evaluations_at_chance + 1 if at_chance else 0
        if (complaint := self.guard.complaint(values, chances, last=True)) is not None:
            raise ValueError(complaint)
        return summary

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.progress.seconds += time.perf_counter() - start

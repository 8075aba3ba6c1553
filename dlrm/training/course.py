"""What is due in a run and when it ends: decided by numbers that every rank has, so that all decide alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dlrm.config import TrainingConfig
from dlrm.metrics.metrics import LOWER_IS_BETTER
from dlrm.training.problem import Values


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


class Course:
    """The way of a run from its first sample to its last.

    Args:
        config: of the run.
        epoch_samples: of one epoch.
    """

    def __init__(self, config: TrainingConfig, epoch_samples: int) -> None:
        self.config, self.epoch_samples = config, epoch_samples
        self.total_samples = max(1, round(config.epochs * epoch_samples))
        self.progress = Progress()
        # A model that has only begun to learn may still guess.
        warmup = max(config.dense_schedule.warm_after, config.tables_schedule.warm_after)
        self.first_judged_sample = max(warmup, self.total_samples // 10)

    def advance(self, end: int, samples: int, loss: float) -> None:
        """Note a step on so many samples, with which the run has come to `end`."""
        self.progress.samples = end
        self.progress.unlogged_loss += loss * samples
        self.progress.unlogged_samples += samples

    def take_mean_loss(self) -> float:
        """Return the mean loss since it was asked for last."""
        progress = self.progress
        mean = progress.unlogged_loss / max(1, progress.unlogged_samples)
        progress.unlogged_loss, progress.unlogged_samples = 0.0, 0
        return mean

    def is_due(self, before: int, every: int) -> bool:
        """Whether a multiple of `every`, or the end, lies between `before` and the samples seen now."""
        samples = self.progress.samples
        return samples // every > before // every or samples >= self.total_samples

    def evaluation_is_due(self, before: int) -> bool:
        """Whether to evaluate after a step that began at `before`."""
        return self.is_due(before, self.config.evaluation.every_samples or self.epoch_samples)

    def checkpoint_is_due(self, before: int, *, evaluated: bool) -> bool:
        """Whether to save after a step that began at `before`."""
        every = self.config.checkpoint.every_samples
        return self.is_due(before, every) if every else evaluated

    def time_is_up(self) -> bool:
        """Whether this rank's clock says that the time limit is reached."""
        limit = self.config.time_limit_seconds
        return limit is not None and self.progress.seconds >= limit

    def reason_to_stop(self, *, time_is_up: bool) -> str | None:
        """Say why the run ends before its last sample; None if it goes on."""
        progress, evaluation = self.progress, self.config.evaluation
        if time_is_up:
            return f"time limit of {self.config.time_limit_seconds} seconds"
        if progress.evaluated_samples != progress.samples or progress.best is None:
            return None
        if evaluation.stop_at is not None and not self._is_better(evaluation.stop_at, progress.best):
            return f"{evaluation.metric} reached {evaluation.stop_at}"
        if evaluation.is_out_of_patience(progress.evaluations_without_gain):
            return f"no better {evaluation.metric} in {progress.evaluations_without_gain} evaluations"
        return None

    def note_evaluation(self, values: Values, *, at_chance: bool) -> bool:
        """Note a measurement of the valid split, and whether it is no better than chance; return if it is the best."""
        progress = self.progress
        value = float(getattr(values, self.config.evaluation.metric))
        defined = not math.isnan(value)
        is_best = defined and (progress.best is None or self._is_better(value, progress.best))
        progress.evaluated_samples = progress.samples
        progress.evaluations_without_gain = 0 if is_best else progress.evaluations_without_gain + defined
        if progress.samples >= self.first_judged_sample:
            progress.evaluations_at_chance = progress.evaluations_at_chance + 1 if at_chance else 0
        if is_best:
            progress.best, progress.best_samples = value, progress.samples
        return is_best

    def forget_best(self) -> None:
        """Measure from here on as if nothing had been measured before."""
        self.progress.best, self.progress.best_samples = None, 0
        self.progress.evaluations_without_gain = 0

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if self.config.evaluation.metric in LOWER_IS_BETTER else value > than

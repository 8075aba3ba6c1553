"""Trains policies of the learning rate with the real training loop, and measures what they are compared by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dlrm.analysis.study.compare_policies import PolicyRun
from dlrm.analysis.study.policies import Policy, without_schedules
from dlrm.analysis.study.range_test import range_test, rising_shape
from dlrm.analysis.study.study_folder import Record, StudyFolder
from dlrm.analysis.study.trial_run import TrialRun, TrialRunner
from dlrm.analysis.study.weight_path import PATH, WeightPath
from dlrm.config import EvaluationConfig, RunConfig
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.optim.lr_schedules import Schedule
from dlrm.training.train_step import autocast
from dlrm.training.trainer import Trainer

# Rows of a split on which loss and confidence are measured; the standard error of a mean of shares is .002 at most.
MEASURED_ROWS = 50_000
LOGGED, NOTED = 200, 40


class PolicyTrainer:
    """Trains policies.

    Args:
        runner: trains runs.
        run: what they have in common.
        policies: by name.
        evaluations: of the valid split within a run.
        span: least and greatest factor of range tests.
        range_samples: of a range test.
        study: where range tests are recorded.
    """

    def __init__(
        self,
        runner: TrialRunner,
        run: RunConfig,
        policies: Mapping[str, Policy],
        *,
        evaluations: int,
        span: tuple[float, float],
        range_samples: float,
        study: StudyFolder,
    ) -> None:
        self.runner, self.run, self.policies, self.study = runner, run, policies, study
        self.span, self.range_samples = span, range_samples
        self.samples = run.epochs * runner.epoch_samples
        self.every_samples = max(1, round(self.samples / evaluations))

    def train(self, wanted: PolicyRun) -> Record:
        """Train a run, and return what is recorded of it."""
        policy = self.policies[wanted.policy]
        factor = float(self.explored(policy)["suggested"]) if wanted.factor is None else wanted.factor
        config = replace(
            policy.configure(self.run, factor),
            seed=wanted.seed,
            log_every_samples=max(1, round(self.samples / LOGGED)),
            evaluation=replace(self.run.evaluation, every_samples=self.every_samples, stop_at=None, patience=None),
        )
        watch: list[WeightPath] = []
        run = self.runner.run(wanted.name, config, self._watch(watch) if wanted.is_reported else None)
        return self._describe(wanted, run, watch, config, factor)

    def explored(self, policy: Policy) -> Record:
        """Return what the range test of a policy found; it is made once."""
        return self.study.trial(f"{policy.name}/explore", lambda: self._explore(policy))

    def _watch(self, watch: list[WeightPath]) -> Callable[[Trainer], Sequence[WeightPath]]:
        def attach(trainer: Trainer) -> Sequence[WeightPath]:
            watch.append(WeightPath(trainer.model, self.samples / NOTED))
            return watch

        return attach

    def _explore(self, policy: Policy) -> dict[str, Any]:
        low, high = self.span
        shape = Schedule(shape=rising_shape(low, high, self.range_samples))
        config = replace(
            without_schedules(self.run),
            dense_schedule=shape,
            tables_schedule=shape,
            epochs=self.range_samples / self.runner.epoch_samples,
            log_every_samples=1,  # each step
            evaluation=EvaluationConfig(batch_size=self.run.evaluation.batch_size),
        )
        records = self.runner.run(f"{policy.name}/explore", config).records("train")
        if not records:
            raise ValueError(f"policy {policy.name}: the loss was not finite at {low:g} times the learning rates")
        middles = [(before + after) / 2 for before, after in pairwise([0, *(r["samples"] for r in records)])]
        found = range_test((shape.factor(at), r["loss"]) for at, r in zip(middles, records, strict=True))
        return {
            "suggested": found.suggested,
            "largest": found.largest,
            "has_turned": found.has_turned,
            "factors": found.factors,
            "losses": found.losses,
            "samples": records[-1]["samples"],
        }

    def _describe(
        self, wanted: PolicyRun, run: TrialRun, watch: Sequence[WeightPath], config: RunConfig, factor: float
    ) -> dict[str, Any]:
        metric = config.evaluation.metric
        valid = [record for record in run.records("valid") if record[metric] is not None]
        best = (max if metric == "auc" else min)((record[metric] for record in valid), default=None)
        record = {
            "policy": wanted.policy,
            "factor": factor,
            "seed": wanted.seed,
            "diverged": run.diverged,
            "best": None if run.diverged else best,
            "course": [(record["samples"], record[metric]) for record in valid],
        }
        if not wanted.is_reported:
            return record
        if watch and watch[0].samples:
            np.save(run.folder / PATH, watch[0].path())
        record["rates"] = _describe_rates(run.records("train"))
        if run.summary is not None:
            record |= {"test_auc": run.summary["auc"], "test_logloss": run.summary["logloss"]}
            record |= self._measure_robustness(run, config)
        return record

    def _measure_robustness(self, run: TrialRun, config: RunConfig) -> dict[str, float]:
        assert run.summary is not None
        split = str(run.summary["split"])
        train, test = (_read_probabilities(run, name, config) for name in ("train", split))
        confidence = np.where(test[1], test[0], 1 - test[0])
        correct = confidence[confidence > 0.5]
        return {
            "gap": _log_loss(*test) - _log_loss(*train),
            "confidence": float(correct.mean()) if len(correct) else 0.5,
            "confidence_deviation": float(correct.std()) if len(correct) else 0.0,
        }


def _describe_rates(records: Sequence[Record]) -> list[tuple[float, int, float, float, float]]:
    """Return [steps, samples, the dense part's rate, the tables' factor, loss] of each training record."""
    rates, steps, before = [], 0.0, 0
    for r in records:
        steps += (r["samples"] - before) / r["batch_size"]
        before = r["samples"]
        rates.append((round(steps, 2), before, r["dense_learning_rate"], r["tables_learning_rate_factor"], r["loss"]))
    return rates


@torch.no_grad()
def _read_probabilities(run: TrialRun, split: str, config: RunConfig) -> tuple[Any, Any]:
    """Return the predicted probabilities and the labels of a split's first rows, in a drawn order."""
    trainer = run.trainer
    assert isinstance(trainer.dataset, Dataset)
    reader = Reader(trainer.dataset, split, shuffle=True)
    logits, labels = [], []
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        for batch in reader.batches(config.evaluation.batch_size, stop=min(MEASURED_ROWS, reader.num_rows)):
            with autocast(config.step.precision, trainer.device.type):
                logits.append(trainer.model(batch.to(trainer.device)).double().cpu())
            labels.append(batch.labels)
    finally:
        trainer.model.train(was_training)
    return torch.cat(logits).sigmoid().numpy(), torch.cat(labels).numpy() > 0.5


def _log_loss(probabilities: Any, labels: Any) -> float:
    right = np.where(labels, probabilities, 1 - probabilities)
    return float(-np.log(np.maximum(right, 1e-12)).mean())

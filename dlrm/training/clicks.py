"""The problem of clicks: a model's logits against labels of 0 and 1, judged by AUC, log loss and calibration."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import override

from dlrm.config import GuardConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.distributed.ranks import Ranks
from dlrm.metrics.metrics import MetricValues, is_at_chance, relative_auc
from dlrm.training.adversarial import build_task
from dlrm.training.evaluate import evaluate, evaluate_true_probability
from dlrm.training.guards import LearningGuard, check_model_fits, check_segments
from dlrm.training.problem import Place, Problem, SampleReader
from dlrm.training.summary import describe_values
from dlrm.training.task import Task


class Clicks(Problem):
    """Clicks of a prepared dataset; models map a `Batch` to logits [B].

    Args:
        dataset: the data.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset: Dataset = dataset
        self.numeric_names = dataset.info.numeric

    @override
    def check(self, model: nn.Module, config: TrainingConfig) -> None:
        check_model_fits(model, self.dataset)
        check_segments(self.dataset, config.evaluation.segment_by)

    @override
    def reader(self, split: str, config: TrainingConfig) -> Reader:
        return Reader(self.dataset, split, shuffle=config.shuffle and split == "train", seed=config.seed)

    @override
    def task(self, model: nn.Module, config: TrainingConfig, ranks: Ranks) -> Task:
        return build_task(model, config)

    @override
    def measure(self, model: nn.Module, reader: SampleReader, config: TrainingConfig, place: Place) -> MetricValues:
        assert isinstance(reader, Reader)
        return evaluate(
            model,
            reader,
            batch_size=config.evaluation.batch_size,
            segment_by=config.evaluation.segment_by,
            precision=config.step.precision,
            device=place.device,
            directory=place.folder,
            ranks=place.ranks,
            stopwatch=place.stopwatch,
        )

    @override
    def describe(self, values: MetricValues, config: TrainingConfig) -> dict[str, Any]:
        return describe_values(values, self.dataset, config.evaluation.segment_by)

    @override
    def tell(self, values: MetricValues) -> str:
        return f"auc {values.auc:.4f}, logloss {values.logloss:.4f}, calibration {values.calibration:.3f}"

    @override
    def finish(self, model: nn.Module, reader: SampleReader, values: MetricValues, place: Place) -> dict[str, Any]:
        assert isinstance(reader, Reader)
        truth = evaluate_true_probability(reader, directory=place.folder, ranks=place.ranks)
        if truth is None:
            return {}
        return {"bayes_auc": truth.auc, "recovered_auc": relative_auc(values.auc, truth.auc)}

    @override
    def is_at_chance(self, values: MetricValues) -> bool:
        return is_at_chance(values.auc, values.positives, values.samples)

    @override
    def complaint(
        self, values: MetricValues, evaluations_at_chance: int, guards: GuardConfig, *, last: bool = False
    ) -> str | None:
        return LearningGuard(guards).complaint(values, evaluations_at_chance, last=last)

"""A learning rate and a momentum that follow the loss's curvature: Lanczos' method on a batch every now and then."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from dlrm.analysis.curvature.lanczos import RitzValues, lanczos, random_start
from dlrm.analysis.curvature.objective import Objective
from dlrm.analysis.curvature.rate_config import CurvatureRateConfig
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.training.attachments import Attachment, Moment

SAMPLES_PER_PART = 8192  # whose activations lie in memory at a time, in float64


def heavy_ball(largest: float, smallest: float) -> tuple[float, float]:
    """Return the learning rate and the momentum that shrink a quadratic's error fastest.

    Per step it shrinks by (sqrt(k) - 1) / (sqrt(k) + 1) with k = largest / smallest, its eigenvalues at both ends
    (Polyak 1964, "Some methods of speeding up the convergence of iteration methods").
    """
    upper, lower = math.sqrt(largest), math.sqrt(smallest)
    return (2 / (upper + lower)) ** 2, ((upper - lower) / (upper + lower)) ** 2


class SlqLrLearner(Attachment):
    """Sets the rate and the momentum of a dense SGD by the Hessian of the dense part on a batch.

    After an idea of Granziol and others, who call their results preliminary; the formulas are Polyak's. The pooled rows
    of the batch are constants. The eigenvalues of a batch are more extreme than those of all data, the more the smaller
    it is, which is what a step on such a batch meets.

    Args:
        config: how often, how well, and between which limits.
        model: with its `tables` apart from its `dense` part, as `dlrm.model.DLRM`.
        optimizer: SGD.
        ranks: who else trains; the Hessian is that of the global batch.

    Raises:
        ValueError: the optimizer is not SGD, or the model has no such parts.
    """

    name = "curvature_rate"

    def __init__(
        self, config: CurvatureRateConfig, model: nn.Module, optimizer: Optimizer, ranks: Ranks = ALONE
    ) -> None:
        tables, dense = getattr(model, "tables", None), getattr(model, "dense", None)
        if not isinstance(optimizer, SGD):
            raise ValueError(f"--curvature-rate: expected --dense.name sgd beside it, got {type(optimizer).__name__}")
        if not isinstance(tables, nn.Module) or not isinstance(dense, nn.Module):
            raise ValueError(f"--curvature-rate: expected a model with tables and dense, got {type(model).__name__}")
        self.config, self.dense, self.optimizer, self.ranks = config, dense, optimizer, ranks
        self.base_rate = float(optimizer.param_groups[0]["lr"])
        self.largest: float | None = None
        self.smallest: float | None = None
        self.measurements = 0
        self._is_due = False
        self._pooled: Tensor | None = None
        tables.register_forward_hook(self._keep_pooled)

    @property
    def rate_and_momentum(self) -> tuple[float, float] | None:
        """What follows from the eigenvalues so far, within the limits; None before the first measurement."""
        if self.largest is None or self.smallest is None:
            return None
        rate, momentum = heavy_ball(self.largest, self.smallest)
        clipped = min(max(rate * self.config.share, self.config.least_rate), self.config.most_rate)
        return clipped, min(momentum, self.config.most_momentum)

    def before_step(self, moment: Moment) -> None:
        """Set the momentum, and see whether this batch is one to measure on."""
        if (both := self.rate_and_momentum) is not None:
            for group in self.optimizer.param_groups:
                group["momentum"] = both[1]
        every = self.config.every_samples
        after = moment.samples + moment.global_size
        self._is_due = every is not None and (not self.measurements or moment.samples // every != after // every)

    def after_backward(self, moment: Moment) -> None:
        """Measure, where it is due, around the weights that the gradients are of."""
        if not self._is_due:
            return
        pooled, self._pooled, self._is_due = self._pooled, None, False
        task = DenseLoss(self.dense)
        objective = Objective(task, _parts(moment, pooled), ranks=self.ranks)
        at = objective.weights()
        start = random_start(len(at), self.measurements, at)
        self.take(lanczos(lambda vector: objective.hessian_product(at, vector), start, self.config.steps))

    def take(self, ritz: RitzValues) -> None:
        """Let new eigenvalues in; those of a loss that is nowhere convex change nothing."""
        self.measurements += 1
        largest = float(ritz.values[-1])
        if not largest > 0:
            return
        smallest = float(ritz.values[ritz.values > self.config.noise_cut * largest].min())
        self.largest = self._smooth(self.largest, largest)
        self.smallest = min(self._smooth(self.smallest, smallest), self.largest)

    def factor(self, group: str) -> float:
        """Return the rate relative to the configuration's; tables have their own."""
        both = self.rate_and_momentum
        return 1.0 if both is None or group not in ("dense", "head") else both[0] / self.base_rate

    def values(self) -> dict[str, float]:
        """Return the eigenvalues, once measured, and the momentum of the last step."""
        if self.largest is None or self.smallest is None:
            return {}
        return {
            "curvature_largest": self.largest,
            "curvature_smallest": self.smallest,
            "dense_momentum": float(self.optimizer.param_groups[0]["momentum"]),
        }

    def state(self) -> dict[str, Any]:
        """Return what has been measured."""
        return {"largest": self.largest, "smallest": self.smallest, "measurements": self.measurements}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.largest, self.smallest = state["largest"], state["smallest"]
        self.measurements = int(state["measurements"])

    def _smooth(self, former: float | None, new: float) -> float:
        keep = self.config.smoothing
        return new if former is None else math.exp(keep * math.log(former) + (1 - keep) * math.log(new))

    def _keep_pooled(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._is_due and module.training:
            self._pooled = output.values().detach().clone()


class DenseLoss(nn.Module):
    """The loss of a dense part as it is now: a copy in float64, which has second derivatives, in evaluation mode.

    There is no dropout in it, and what normalises does so by its running statistics.

    Args:
        dense: maps numbers and pooled rows to logits.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = copy.deepcopy(dense).double().eval()  # a copy is not compiled, even if the original is

    def forward(self, part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Map numbers, pooled rows and labels to the mean cross-entropy."""
        numbers, pooled, labels = part
        logits = self.dense(numbers, pooled)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def _parts(moment: Moment, pooled: Tensor | None) -> list[tuple[tuple[Tensor, Tensor, Tensor], int]]:
    batch = moment.batch
    if pooled is None or not len(batch):
        return []
    columns = [tensor.double().split(SAMPLES_PER_PART) for tensor in (batch.dense, pooled, batch.labels)]
    return [((numbers, rows, labels), len(labels)) for numbers, rows, labels in zip(*columns, strict=True)]

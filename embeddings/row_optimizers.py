"""The optimizers that update a table's rows inside backward, as plain descriptions without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RowSGD:
    """Stochastic gradient descent on the rows of a batch.

    For each row that the batch touches, with ``g`` the sum of the row's gradients over the batch::

        g = g + weight_decay * w
        w = w - learning_rate * g

    Rows that the batch does not touch are not decayed.
    """

    learning_rate: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_number("RowSGD", "learning_rate", self.learning_rate)
        _check_number("RowSGD", "weight_decay", self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad:
    """Adagrad with one accumulator per row (fbgemm's ``EXACT_ROWWISE_ADAGRAD`` with ``WeightDecayMode.L2``).

    For each row that the batch touches, with ``g`` the sum of the row's gradients over the batch::

        g = g + weight_decay * w
        s = s + mean(g ** 2)                                    # over the row's dim
        w = w - learning_rate * g / (sqrt(s) + eps)
    """

    learning_rate: float
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_number("RowWiseAdagrad", "learning_rate", self.learning_rate)
        _check_number("RowWiseAdagrad", "eps", self.eps)
        _check_number("RowWiseAdagrad", "weight_decay", self.weight_decay)


RowOptimizer = RowSGD | RowWiseAdagrad


def _check_number(owner: str, setting: str, number: float) -> None:
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{owner}: expected {setting} to be a finite number >= 0, got {number}")

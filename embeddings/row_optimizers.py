"""The optimizers that update a table's rows inside backward, as plain descriptions without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


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


@dataclass(frozen=True, kw_only=True)
class RowAdagrad:
    """Adagrad with one accumulator per number (fbgemm's ``EXACT_ADAGRAD``).

    For each row that the batch touches, with ``g`` the sum of the row's gradients over the batch::

        g = g + weight_decay * w
        s = s + g ** 2
        w = w - learning_rate * g / (sqrt(s) + eps)
    """

    learning_rate: float
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for setting in ("learning_rate", "eps", "weight_decay"):
            _check_number("RowAdagrad", setting, getattr(self, setting))


@dataclass(frozen=True, kw_only=True)
class RowAdam:
    """Adam on the rows of a batch only, "lazy" (fbgemm's ``ADAM``; Kingma and Ba 2015, arXiv:1412.6980).

    For each row that the batch touches, with ``g`` the sum of the row's gradients and ``t`` the table's number of
    updates so far, this one included (not the row's: a row that was away sees no correction when it comes back)::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g ** 2
        w = w - learning_rate * (m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps) + weight_decay * w)
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for setting in ("learning_rate", "eps", "weight_decay"):
            _check_number("RowAdam", setting, getattr(self, setting))
        _check_betas("RowAdam", self.betas)


@dataclass(frozen=True, kw_only=True)
class RowLamb:
    """LAMB with a trust ratio per row (fbgemm's ``LAMB``, ``PARTIAL_ROWWISE_LAMB``; You et al. 2020, arXiv:1904.00962).

    For each row that the batch touches, with ``g`` and ``t`` as in ``RowAdam``::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g ** 2                    # ``partial``: of mean(g ** 2), one number per row
        u = m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps) + weight_decay * w
        q = ||w|| / ||u||, or 1 where one of the two is 0
        w = w - learning_rate * q * u

    Attributes:
        learning_rate: relative to a row's own length.
        betas: of the two moments.
        eps: added to the root of the second moment.
        weight_decay: inside the direction, before its norm is taken.
        partial: keep one second moment per row instead of one per number.
        trust: over what the two norms are taken: each ``row``, or all rows of a table that are ``touched`` by a batch.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    partial: bool = False
    trust: Literal["row", "touched"] = "row"

    def __post_init__(self) -> None:
        for setting in ("learning_rate", "eps", "weight_decay"):
            _check_number("RowLamb", setting, getattr(self, setting))
        _check_betas("RowLamb", self.betas)
        if self.trust not in ("row", "touched"):
            raise ValueError(f"RowLamb: expected trust 'row' or 'touched', got {self.trust!r}")


RowOptimizer = RowSGD | RowAdagrad | RowWiseAdagrad | RowAdam | RowLamb


def state_columns(optimizer: RowOptimizer) -> dict[str, bool]:
    """Names the states that an optimizer keeps of each row, in their order, and says of which it keeps every column.

    Of the others it keeps one number per row. All are in fp32.
    """
    if isinstance(optimizer, RowSGD):
        return {}
    if isinstance(optimizer, RowAdagrad | RowWiseAdagrad):
        return {"sum_of_squares": isinstance(optimizer, RowAdagrad)}
    return {"first_moment": True, "second_moment": not (isinstance(optimizer, RowLamb) and optimizer.partial)}


def counts_updates(optimizer: RowOptimizer, row_type: str) -> bool:
    """Says whether a table keeps the number of its updates, in float64: for a correction, or to round 16-bit rows."""
    return isinstance(optimizer, RowAdam | RowLamb) or row_type != "fp32"


def _check_betas(owner: str, betas: tuple[float, float]) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{owner}: expected two betas in [0, 1), got {betas}")


def _check_number(owner: str, setting: str, number: float) -> None:
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{owner}: expected {setting} to be a finite number >= 0, got {number}")

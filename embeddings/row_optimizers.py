"""The optimizers that update a table's rows inside backward, as plain descriptions without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Trust = Literal["row", "touched", "table"]


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
    """LAMB with a trust ratio per row or table (You et al. 2020, arXiv:1904.00962; fbgemm's ``LAMB`` per row).

    For each row that the batch touches, with ``g`` and ``t`` as in ``RowAdam``::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g ** 2                    # ``partial``: of mean(g ** 2), one number per row
        u = m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps) + weight_decay * w
        q = ||w|| / ||u||, or 1 where one of the two is 0
        w = w - learning_rate * q * u

    With ``trust="table"`` this is LAMB of a dense weight: in each step all rows decay their moments and move, those
    that the batch does not touch with ``g = 0``, which takes as long as the table is large.

    Attributes:
        learning_rate: relative to a row's own length.
        betas: of the two moments.
        eps: added to the root of the second moment.
        weight_decay: inside the direction, before its norm is taken.
        partial: keep one second moment per row instead of one per number.
        trust: over what the two norms are taken: each ``row``, all rows of a table that are ``touched`` by a batch,
            or the whole ``table``.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    partial: bool = False
    trust: Trust = "row"

    def __post_init__(self) -> None:
        for setting in ("learning_rate", "eps", "weight_decay"):
            _check_number("RowLamb", setting, getattr(self, setting))
        _check_betas("RowLamb", self.betas)
        if self.trust not in get_args(Trust):
            raise ValueError(f"RowLamb: expected trust 'row', 'touched' or 'table', got {self.trust!r}")


@dataclass(frozen=True, kw_only=True)
class RowCowClip:
    """Adam on clipped gradients, CowClip as published (Zheng et al. 2022, arXiv:2204.06240).

    In each step, for every row, with ``g`` the sum of its gradients of the mean loss over the global batch, ``cnt`` how
    often its id occurs there (1 if it does not) and ``t`` the table's number of updates, this one included::

        g = g + 2 * l2 * w
        most = clip * cnt * max(||w||, clip * sqrt(dim) * zeta)
        g = g * min(1, most / ||g||)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g ** 2
        w = w - learning_rate * m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps)

    As published, all rows decay their moments, are pulled towards 0 and move in each step, which takes as long as the
    table is large. ``l2_mode="lazy"`` departs from it: of a row that the batch does not touch nothing changes, and one
    that it does gets ``l2`` once for each step since it was touched last, all of it under one clipping.

    Attributes:
        learning_rate: of Adam; published: the same for every batch size.
        betas: of the two moments.
        eps: added to the root of the second moment.
        clip: ``r`` of the paper: the longest gradient of one occurrence, relative to its row.
        zeta: the length under which a row is taken to be longer than it is, per root of a number; above 0, as a row
            of zeros could never learn otherwise.
        l2: weight of the sum of squares of all rows in the loss; published: in proportion to the batch size.
        l2_mode: ``dense`` as published, or ``lazy``.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0
    zeta: float = 1e-5
    l2: float = 0.0
    l2_mode: Literal["dense", "lazy"] = "dense"

    def __post_init__(self) -> None:
        for setting in ("learning_rate", "eps", "l2"):
            _check_number("RowCowClip", setting, getattr(self, setting))
        for setting in ("clip", "zeta"):
            number = getattr(self, setting)
            if not 0 < number < math.inf:
                raise ValueError(f"RowCowClip: expected {setting} to be a finite number > 0, got {number}")
        _check_betas("RowCowClip", self.betas)
        if self.l2_mode not in ("dense", "lazy"):
            raise ValueError(f"RowCowClip: expected l2_mode 'dense' or 'lazy', got {self.l2_mode!r}")


RowOptimizer = RowSGD | RowAdagrad | RowWiseAdagrad | RowAdam | RowLamb | RowCowClip


def state_columns(optimizer: RowOptimizer) -> dict[str, bool]:
    """Names the states that an optimizer keeps of each row, in their order, and says of which it keeps every column.

    Of the others it keeps one number per row. All are in fp32; ``last_update`` is the number of the table's update.
    """
    if isinstance(optimizer, RowSGD):
        return {}
    if isinstance(optimizer, RowAdagrad | RowWiseAdagrad):
        return {"sum_of_squares": isinstance(optimizer, RowAdagrad)}
    moments = {"first_moment": True, "second_moment": not (isinstance(optimizer, RowLamb) and optimizer.partial)}
    is_lazy = isinstance(optimizer, RowCowClip) and optimizer.l2_mode == "lazy"
    return moments | ({"last_update": False} if is_lazy else {})


def counts_updates(optimizer: RowOptimizer, row_type: str) -> bool:
    """Says whether a table keeps the number of its updates, in float64: for a correction, or to round 16-bit rows."""
    return isinstance(optimizer, RowAdam | RowLamb | RowCowClip) or row_type != "fp32"


def trust_of(optimizer: RowOptimizer) -> Trust:
    """Says over what the norms are taken that an optimizer measures last."""
    return optimizer.trust if isinstance(optimizer, RowLamb) else "row"


def moves_all_rows(optimizer: RowOptimizer) -> bool:
    """Says whether each update changes all rows of the table, and not only those that the batch touches."""
    return trust_of(optimizer) == "table" or (isinstance(optimizer, RowCowClip) and optimizer.l2_mode == "dense")


def _check_betas(owner: str, betas: tuple[float, float]) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{owner}: expected two betas in [0, 1), got {betas}")


def _check_number(owner: str, setting: str, number: float) -> None:
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{owner}: expected {setting} to be a finite number >= 0, got {number}")

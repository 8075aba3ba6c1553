"""Which states and which kernels a row optimizer has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from embeddings.kernels import moment_kernels, update_kernels
from embeddings.kernels.update_kernels import UpdateSettings
from embeddings.local.row_memory import zero_rows
from embeddings.row_optimizers import (
    RowAdagrad,
    RowAdam,
    RowCowClip,
    RowLamb,
    RowOptimizer,
    RowSGD,
    RowWiseAdagrad,
    counts_updates,
    state_columns,
)
from embeddings.tables import TableConfig

if TYPE_CHECKING:  # processes that hold rows and compute nothing start without it
    from torch import Tensor

Kernel = Callable[..., Any]


class RowUpdate(NamedTuple):
    """How a table's rows are updated: in stages, with an exchange after each that measures where others share them."""

    kind: int  # as ``fused_kernels`` knows it, which runs all stages at once
    measures: tuple[Kernel, ...]
    sizes: tuple[int, ...]  # how many numbers each of the measures gives per row
    finish: Kernel
    states: tuple[str, ...]  # by name: the first and the second state of the kernels, and the last updates


def row_update(optimizer: RowOptimizer) -> RowUpdate:
    """Finds the kernels of a row optimizer; none is compiled before it is called."""
    u, m = update_kernels, moment_kernels
    states = tuple(state_columns(optimizer))
    if isinstance(optimizer, RowSGD):
        return RowUpdate(u.SGD, (), (), u.finish_sgd, states)
    if isinstance(optimizer, RowWiseAdagrad):
        return RowUpdate(u.ROW_WISE_ADAGRAD, (u.measure_gradients,), (1,), u.finish_row_wise_adagrad, states)
    if isinstance(optimizer, RowAdagrad):
        return RowUpdate(u.ADAGRAD, (), (), u.finish_adagrad, states)
    if isinstance(optimizer, RowAdam):
        return RowUpdate(u.ADAM, (), (), m.finish_adam, states)
    if isinstance(optimizer, RowCowClip):
        return RowUpdate(u.COW_CLIP, (m.measure_gradients_with_l2,), (2,), m.finish_cow_clip, states)
    if optimizer.partial:
        measures = (m.measure_squares, m.measure_partial_directions)
        return RowUpdate(u.PARTIAL_LAMB, measures, (1, 2), m.finish_lamb, states)
    return RowUpdate(u.LAMB, (m.measure_directions,), (2,), m.finish_lamb, states)


def make_state(config: TableConfig, num_rows: int, num_columns: int) -> dict[str, Tensor]:
    """Makes the optimizer's state of some rows and columns of a table, by name, all zeros.

    ``updates`` counts the table's updates, where the optimizer or the rounding of rows depends on them.
    """
    state = {
        name: zero_rows(num_rows, num_columns) if has_columns else zero_rows(num_rows)
        for name, has_columns in state_columns(config.optimizer).items()
    }
    if counts_updates(config.optimizer, config.row_type):
        import torch

        state["updates"] = torch.zeros((), dtype=torch.float64)
    return state


def settings_of(config: TableConfig, updates: int, factor: float, eps_factor: float) -> UpdateSettings:
    """Gives what the kernels are told about an update.

    Args:
        config: The table.
        updates: The table's number of updates, this one included.
        factor: Multiplies the learning rate.
        eps_factor: Multiplies ``eps``.
    """
    optimizer = config.optimizer
    beta1, beta2 = optimizer.betas if isinstance(optimizer, RowAdam | RowLamb | RowCowClip) else (0.0, 0.0)
    cow_clip = optimizer if isinstance(optimizer, RowCowClip) else None
    return UpdateSettings(
        kind=row_update(optimizer).kind,
        rate=optimizer.learning_rate * factor,
        decay=2.0 * optimizer.l2 if isinstance(optimizer, RowCowClip) else optimizer.weight_decay,
        eps=0.0 if isinstance(optimizer, RowSGD) else optimizer.eps * eps_factor,
        dim=float(config.dim),
        beta1=beta1,
        beta2=beta2,
        correction1=1.0 - beta1**updates,
        correction2=1.0 - beta2**updates,
        updates=float(updates),
        clip=cow_clip.clip if cow_clip else 0.0,
        shortest=cow_clip.clip * math.sqrt(config.dim) * cow_clip.zeta if cow_clip else 0.0,
    )

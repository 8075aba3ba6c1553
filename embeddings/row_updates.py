"""Which states and which kernels a row optimizer has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embeddings import update_kernels
from embeddings.row_optimizers import RowOptimizer, RowSGD, RowWiseAdagrad
from embeddings.tables import TableConfig
from embeddings.update_kernels import UpdateSettings

Kernel = Callable[..., Any]


class RowUpdate(NamedTuple):
    """How a table's rows are updated: all at once, or in stages with an exchange after each that measures."""

    fused: Kernel
    measures: tuple[Kernel, ...]
    sizes: tuple[int, ...]  # how many numbers each of the measures gives per row
    finish: Kernel
    states: tuple[str, ...]  # by name: the first and the second state of the kernels


def row_update(optimizer: RowOptimizer) -> RowUpdate:
    """Finds the kernels of a row optimizer; none is compiled before it is called."""
    k = update_kernels
    if isinstance(optimizer, RowSGD):
        return RowUpdate(k.update_sgd, (), (), k.finish_sgd, ())
    if isinstance(optimizer, RowWiseAdagrad):
        measures = (k.measure_gradients,)
        return RowUpdate(k.update_row_wise_adagrad, measures, (1,), k.finish_row_wise_adagrad, ("sum_of_squares",))
    raise NotImplementedError(f"row optimizer {type(optimizer).__name__}")


def make_state(config: TableConfig, num_rows: int, num_columns: int) -> dict[str, Tensor]:
    """Makes the optimizer's state of some rows and columns of a table, by name, all zeros."""
    if isinstance(config.optimizer, RowWiseAdagrad):
        return {"sum_of_squares": torch.zeros(num_rows)}
    return {}


def settings_of(config: TableConfig, state: Mapping[str, Tensor], factor: float) -> UpdateSettings:
    """Gives what the kernels are told about the next update; ``factor`` multiplies the learning rate."""
    optimizer = config.optimizer
    return UpdateSettings(
        rate=optimizer.learning_rate * factor,
        decay=optimizer.weight_decay,
        eps=getattr(optimizer, "eps", 0.0),
        dim=float(config.dim),
        beta1=0.0,
        beta2=0.0,
        correction1=1.0,
        correction2=1.0,
    )

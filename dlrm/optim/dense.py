"""Make the dense optimizer that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lamb import Lamb


def build_dense_optimizer(config: DenseOptimizerConfig, named_parameters: Iterable[tuple[str, Tensor]]) -> Optimizer:
    """Make the optimizer of the dense parameters.

    It has one group with the matrices and, where there are any, one with the tensors of at most one dimension (biases,
    norm scales), which have no weight decay. Groups carry the parameters' names. Frozen parameters are left out.

    Args:
        config: The optimizer and its options.
        named_parameters: Names and parameters of everything but the tables.

    Raises:
        ValueError: If there is nothing to train.
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not named:
        raise ValueError("expected at least one dense parameter to train, got a model with tables or frozen ones only")
    matrices = [pair for pair in named if pair[1].ndim > 1]
    vectors = [pair for pair in named if pair[1].ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": config.weight_decay}] if matrices else []
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    given = {name: getattr(config, name) for name in ("betas", "eps", "momentum", "max_grad_norm")}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    kinds: dict[str, type[Optimizer]] = {
        "lamb": Lamb,
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "adagrad": torch.optim.Adagrad,
    }
    return kinds[config.name](groups, lr=config.learning_rate, **options)  # type: ignore[call-arg]

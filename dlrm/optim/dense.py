"""Make the dense optimizer that a configuration asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dlrm.optim.config import AS_DENSE, OPTIONS, DenseOptimizerConfig, HeadConfig, is_given
from dlrm.optim.factored import Factored
from dlrm.optim.groups import group_parameters
from dlrm.optim.hybrid import HybridOptimizer
from dlrm.optim.lamb import Lamb
from dlrm.optim.lars import Lars

_KINDS: dict[str, type[Optimizer]] = {
    "lamb": Lamb,
    "lars": Lars,
    "factored": Factored,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
}


def build_dense_optimizer(config: DenseOptimizerConfig, model: nn.Module, head: HeadConfig = AS_DENSE) -> Optimizer:
    """Make the optimizer of a model's dense parameters.

    Its groups are those of `group_parameters`: `dense`, `head` with its own decay and rate if it is given one, and
    `vectors` (biases, norm scales) without weight decay. It is a `HybridOptimizer` where the head's is of another kind.

    Args:
        config: The optimizer and its options.
        model: Whose parameters are trained; tables are not among them.
        head: What is different for the layer that gives the logit.

    Raises:
        ValueError: If there is nothing to train, or the head's configuration does not go with ``config``.
    """
    groups = group_parameters(model)
    if not groups:
        raise ValueError("expected at least one dense parameter to train, got a model with tables or frozen ones only")
    of_head = head.resolve(config)
    for group in groups:
        its = of_head if group["name"] == "head" else config
        group["lr"], group["weight_decay"] = its.learning_rate, 0.0 if group["name"] == "vectors" else its.weight_decay
    if of_head.name == config.name:
        return _make(config, groups)
    parts = [(its, [g for g in groups if (g["name"] == "head") == (its is of_head)]) for its in (config, of_head)]
    members = [_make(its, part) for its, part in parts if part]
    return members[0] if len(members) == 1 else HybridOptimizer(members)


def _make(config: DenseOptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    options = {name: value for name in OPTIONS if is_given(value := getattr(config, name))}
    if (moment_type := options.pop("moment_type", None)) is not None:
        options["moment_dtype"] = {"fp32": torch.float32, "bf16": torch.bfloat16}[moment_type]
    return _KINDS[config.name](groups, lr=config.learning_rate, **options)  # type: ignore[call-arg]

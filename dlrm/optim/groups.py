"""Sorts a model's dense parameters into the groups that may have an optimizer, a decay and a schedule of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

GROUP_NAMES = ("dense", "head", "vectors")


def find_head(model: nn.Module) -> nn.Linear | None:
    """Return the layer that gives the logit: the last linear layer of `model.head`, or without one, of the model.

    The last one is that which was registered last, as the top MLP's in a `DLRM`. None where there is no linear layer.
    """
    part = getattr(model, "head", None)
    layers = (part if isinstance(part, nn.Module) else model).modules()
    return next((layer for layer in reversed(list(layers)) if isinstance(layer, nn.Linear)), None)


def group_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """Sort a model's parameters into groups for an optimizer, each with its `name` and its named parameters.

    `dense` are the matrices, `head` is the matrix of the layer that `find_head` finds, and `vectors` are all tensors of
    at most one dimension: biases, norm scales. Frozen parameters and empty groups are left out, and so are tables,
    which are not among a model's parameters.
    """
    head = find_head(model)
    members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = head is not None and parameter is head.weight
            members["vectors" if parameter.ndim <= 1 else "head" if is_head else "dense"].append((name, parameter))
    return [{"name": name, "params": named} for name, named in members.items() if named]

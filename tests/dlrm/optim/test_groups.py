"""Every dense parameter is in one group, by its shape and by whether the logit comes out of it."""

from __future__ import annotations

import pytest
from torch import nn

from dlrm.config import Interaction
from dlrm.model import DLRM
from dlrm.optim.groups import find_head, group_parameters
from embeddings import TableConfig


def names_of(model: nn.Module) -> dict[str, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in group_parameters(model)}


@pytest.mark.parametrize("interaction", ["dot", "dcn", "fm", "projection"])
def test_a_dlrm_has_its_head_at_the_end_of_the_top_mlp(interaction: Interaction) -> None:
    tables = [TableConfig(name=name, num_rows=5, dim=4) for name in ("a", "b")]
    model = DLRM(num_numeric=3, tables=tables, dim=4, bottom=(6,), top=(7, 5), interaction=interaction)
    groups = names_of(model)
    assert groups["head"] == ["dense.top.4.weight"]
    assert find_head(model) is model.dense.top[4]
    parameters = dict(model.named_parameters())
    assert sorted(name for names in groups.values() for name in names) == sorted(parameters)
    assert all(parameters[name].ndim > 1 for name in groups["dense"])
    assert all(parameters[name].ndim <= 1 for name in groups["vectors"])
    assert "dense.top.4.bias" in groups["vectors"]
    assert "dense.top.0.weight" in groups["dense"]


class Named(nn.Module):
    """Registers what gives the logit first, and names it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        self.body = nn.Linear(2, 3)


def test_a_model_may_name_its_head() -> None:
    assert names_of(Named()) == {
        "dense": ["head.0.weight", "body.weight"],
        "head": ["head.1.weight"],
        "vectors": ["head.0.bias", "head.1.bias", "body.bias"],
    }


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1, bias=False))
    model[2].requires_grad_(False)
    assert names_of(model) == {"dense": ["0.weight"], "vectors": ["0.bias", "1.weight", "1.bias"]}


def test_a_model_without_linear_layers_has_no_head() -> None:
    assert names_of(nn.Conv1d(2, 3, 1, bias=False)) == {"dense": ["weight"]}

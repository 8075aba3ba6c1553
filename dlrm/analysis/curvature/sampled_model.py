"""A run's network as an analysis sees it: twice differentiable, and with those rows only that its sample touches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlrm.analysis.curvature.sample import Bags, Sample, SamplePart
from dlrm.checkpoints.pieces import PartedTensor, as_parts
from dlrm.config import ModelConfig
from dlrm.model import DLRM
from embeddings import TableConfig

Solution = dict[str, Tensor]
"""Weights and buffers of a `SampledModel`, by name."""
DENSE, ROWS = "dense.", "rows."


class SampledModel(nn.Module):
    """The mean loss of a trained network over a part of a sample, in float64 and in evaluation mode.

    Rows are ordinary parameters here, looked up and summed by operators that have second derivatives; in float64, so
    has the dot interaction.

    Args:
        config: the run's, as its folder holds it.
        sample: what it will be evaluated on.

    Raises:
        ValueError: the run is not one of `recforge train`.
    """

    def __init__(self, config: Mapping[str, Any], sample: Sample) -> None:
        super().__init__()
        described = read_tables(config)
        settings = {name: config["model"][name] for name in ModelConfig.__dataclass_fields__ if name in config["model"]}
        first = next(iter(sample.parts.values()))[0][0]
        # Of the tables only their names and dims are needed: their rows come from the sample.
        small = [
            TableConfig(name=name, num_rows=1, dim=table["dim"], features=tuple(table["features"]))
            for name, table in described.items()
        ]
        network = DLRM(num_numeric=first.numbers.shape[1], tables=small, **settings)
        self.dense = network.dense.double().eval()
        self.tables = [(tuple(table["features"]), table["pooling"]) for table in described.values()]
        self.rows = nn.ParameterList(
            nn.Parameter(torch.zeros(len(sample.touched[name]), table["dim"], dtype=torch.float64))
            for name, table in described.items()
        )

    def forward(self, part: SamplePart) -> Tensor:
        """Return the mean binary cross-entropy."""
        pooled = [
            _pool(rows, part.bags[feature], pooling)
            for rows, (features, pooling) in zip(self.rows, self.tables, strict=True)
            for feature in features
        ]
        logits = self.dense(part.numbers, torch.cat(pooled, dim=1))
        return nn.functional.binary_cross_entropy_with_logits(logits, part.labels)

    def names(self, weights: str) -> list[str]:
        """Return the names of the parameters of the `dense` part, or of `all`."""
        return [name for name, _ in self.named_parameters() if weights == "all" or name.startswith(DENSE)]

    def load(self, solution: Solution) -> None:
        """Take a run's weights.

        Raises:
            ValueError: they are of another network.
        """
        try:
            self.load_state_dict(solution)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise ValueError(f"expected weights of the network in config.json, got others: {why}") from None


def read_tables(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a run's configuration says of its tables, by name.

    Raises:
        ValueError: it does not describe a DLRM and its tables.
    """
    tables: dict[str, dict[str, Any]] = config.get("network", {}).get("tables", {})
    if not tables or "model" not in config:
        raise ValueError("expected a run of `recforge train`, whose config.json describes its model, got another")
    return tables


def check_same_architecture(first: Mapping[str, Any], second: Mapping[str, Any], runs: tuple[Path, Path]) -> None:
    """Check that two runs have the same network, for otherwise there is no line between them, and nothing to compare.

    Raises:
        ValueError: naming the first difference.
    """
    sizes = [
        {
            **{name: list(shape) for name, shape in config["network"]["parameters"].items()},
            **{name: [table["num_rows"], table["dim"]] for name, table in read_tables(config).items()},
            **config["model"],
        }
        for config in (first, second)
    ]
    for name in sizes[0] | sizes[1]:
        if sizes[0].get(name) != sizes[1].get(name):
            raise ValueError(
                f"expected two runs of the same network, got {name} = {sizes[0].get(name)} in {runs[0]} and "
                f"{sizes[1].get(name)} in {runs[1]}; train both with the same model and data"
            )


def read_solution(state: Mapping[str, Any], config: Mapping[str, Any], sample: Sample) -> Solution:
    """Return what a checkpoint holds of a sampled model: the dense part, and the rows that the sample touches."""
    solution = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state["dense"].items()
    }
    stored = as_parts(state["tables"])
    for place, table in enumerate(read_tables(config)):
        solution[f"{ROWS}{place}"] = _pick_rows(stored[f"{table}.weight"], sample.touched[table])
    return solution


def _pick_rows(table: PartedTensor, ids: Tensor) -> Tensor:
    """Return rows `ids`, ascending, of a table that is never in memory as a whole."""
    if len(ids) and int(ids[-1]) >= table.shape[0]:
        raise ValueError(f"expected ids below {table.shape[0]}, got {int(ids[-1])}; give the run's own --data")
    picked, first = [], 0
    for block in table.blocks():
        here = ids[(ids >= first) & (ids < first + len(block))] - first
        picked.append(block[here].double())
        first += len(block)
    return torch.cat(picked)


def _pool(rows: Tensor, bags: Bags, pooling: str) -> Tensor:
    looked_up = rows[bags.places]
    if bags.has_one_each:
        return looked_up
    summed = rows.new_zeros(len(bags.lengths), rows.shape[1]).index_add(0, bags.bag_of, looked_up)
    return summed / bags.lengths.clamp(min=1)[:, None] if pooling == "mean" else summed

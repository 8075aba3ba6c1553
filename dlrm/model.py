"""The deep learning recommendation model: tables on ids, MLPs on numbers, and an interaction between the two.

Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
arXiv:1906.00091; the cross network is that of Wang et al. 2021, "DCN V2", arXiv:2008.13535.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dlrm.batch import Batch
from dlrm.config import BatchNorm, Interaction, ModelConfig, SmallTablesConfig, TablesConfig
from dlrm.data.dataset import DatasetInfo
from dlrm.descriptions import describe_tables
from dlrm.ghost_batch_norm import GhostBatchNorm
from dlrm.interaction import CrossInteraction, DotInteraction, FactorizationMachine
from embeddings import ShardingPlan, TableConfig
from embeddings.build import Kernel, build_tables
from embeddings.interface import Tables
from embeddings.shards import Exchange

Norm = Callable[[int], nn.Module]
"""Makes what normalises a layer of that width."""


class DLRM(nn.Module):
    """Maps a `Batch` to logits.

    Args:
        num_numeric: columns of `Batch.dense`.
        tables: one vector per feature comes out of them, in their order.
        dim: length of the bottom MLP's output; what `dot`, `fm` and `projection` expect of every table.
        bottom: hidden layers of the MLP on numbers.
        top: hidden layers of the MLP on the interaction.
        interaction: `dot`, `dcn`, `fm` or `projection`.
        projection: number of combined vectors of `projection`.
        cross_layers: layers of `dcn`.
        cross_rank: rank of the weights of `dcn`.
        dropout: after each hidden layer of the top MLP.
        batch_norm: `ghost` normalises the hidden layers of the top MLP before their activation.
        ghost_size: samples that are normalised together.
        seed: of the tables' rows; the MLPs draw from torch's generator, as any module.
        device: where rows and weights live.
        kernel: whose kernels look rows up; see `embeddings.build`.
        plan: which rank holds which rows; None holds all of them here.
        exchange: type in which rows travel between ranks.
        built_tables: those of `tables`, where somebody has built them, as on servers; the five before say nothing
            then.

    Raises:
        ValueError: a table's dim does not suit the interaction, or a setting is out of range.
    """

    def __init__(
        self,
        *,
        num_numeric: int,
        tables: Sequence[TableConfig],
        dim: int = 16,
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (64, 32),
        interaction: Interaction = "dot",
        projection: int = 8,
        cross_layers: int = 2,
        cross_rank: int = 64,
        dropout: float = 0.0,
        batch_norm: BatchNorm = "none",
        ghost_size: int = 128,
        seed: int = 0,
        device: torch.device | str = "cpu",
        kernel: Kernel = "auto",
        plan: ShardingPlan | None = None,
        exchange: Exchange = "fp32",
        built_tables: Tables | None = None,
    ) -> None:
        super().__init__()
        self.num_numeric = num_numeric
        dims = {feature: table.dim for table in tables for feature in table.features}
        if interaction != "dcn":
            _check_dims(dims, dim, interaction)
        if built_tables is not None and built_tables.table_configs != tuple(tables):
            raise ValueError("built_tables: expected those of `tables`, in their order, got others")
        self.tables = built_tables or build_tables(
            tables, seed=seed, device=device, kernel=kernel, plan=plan, exchange=exchange
        )
        self.dense = DenseNetwork(
            bottom=mlp([num_numeric, *bottom, dim]) if num_numeric else Constant(dim),
            interaction=_build_interaction(interaction, dims, dim, projection, cross_layers, cross_rank),
            top=top,
            dropout=dropout,
            norm=partial(GhostBatchNorm, ghost=ghost_size) if batch_norm == "ghost" else None,
        ).to(device)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits [B].

        Raises:
            ValueError: the batch has another number of numeric columns than the model.
        """
        if batch.dense.shape[1] != self.num_numeric:
            raise ValueError(
                f"model: expected num_numeric = {batch.dense.shape[1]} as in the data, got {self.num_numeric}"
            )
        logits: Tensor = self.dense(batch.dense, self.tables(batch.sparse).values())
        return logits


class DenseNetwork(nn.Module):
    """What is replicated over ranks and may be compiled: everything but the tables."""

    def __init__(
        self, *, bottom: nn.Module, interaction: nn.Module, top: Sequence[int], dropout: float, norm: Norm | None = None
    ) -> None:
        super().__init__()
        self.bottom = bottom
        self.interaction = interaction
        width: Any = interaction.out_dim
        self.top = mlp([width, *top, 1], dropout=dropout, norm=norm, last_is_linear=True)

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Map numbers [B, num_numeric] and pooled rows [B, sum(dims)] to logits [B]."""
        logits: Tensor = self.top(self.interaction(self.bottom(dense), pooled)).squeeze(-1)
        return logits


class Constant(nn.Module):
    """Stands in for the bottom MLP where there are no numbers: the same learned vector for every sample."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(dim) * dim**-0.5)

    def forward(self, dense: Tensor) -> Tensor:
        """Return [B, dim]."""
        return self.vector.expand(len(dense), -1)


def mlp(
    widths: Sequence[int], *, dropout: float = 0.0, norm: Norm | None = None, last_is_linear: bool = False
) -> nn.Sequential:
    """Build linear layers with ReLU between them, and after the last one unless it is linear; a norm is before each."""
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if index < len(widths) - 2 or not last_is_linear:
            layers += [nn.ReLU()] if norm is None else [norm(fan_out), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def build_dlrm(
    info: DatasetInfo,
    model: ModelConfig,
    tables: TablesConfig,
    small_tables: SmallTablesConfig | None = None,
    *,
    seed: int,
    device: str,
    plan: ShardingPlan | None = None,
    exchange: Exchange = "fp32",
    built_tables: Tables | None = None,
) -> DLRM:
    """Build the model that a recipe describes, for the columns of a dataset."""
    settings = {name: getattr(model, name) for name in ModelConfig.__dataclass_fields__}
    return DLRM(
        num_numeric=len(info.numeric),
        tables=describe_tables(info, model.dim, tables, small_tables),
        seed=seed,
        device=device,
        kernel=tables.kernel,
        plan=plan,
        exchange=exchange,
        built_tables=built_tables,
        **settings,
    )


def _build_interaction(
    kind: Interaction, dims: dict[str, int], dim: int, projection: int, cross_layers: int, cross_rank: int
) -> nn.Module:
    if kind == "dcn":
        return CrossInteraction(dim + sum(dims.values()), rank=cross_rank, layers=cross_layers)
    if kind == "fm":
        return FactorizationMachine(len(dims) + 1, dim)
    return DotInteraction(len(dims) + 1, dim, projection=projection if kind == "projection" else None)


def _check_dims(dims: dict[str, int], dim: int, interaction: Interaction) -> None:
    different = _names(feature for feature, its_dim in dims.items() if its_dim != dim)
    if different:
        raise ValueError(
            f"interaction '{interaction}': expected every table's dim to be {dim} as the bottom MLP's output, got "
            f"others for {different}; set --model.dim, or --model.interaction dcn, which takes any dims"
        )


def _names(features: Iterable[str]) -> str:
    return ", ".join(repr(feature) for feature in features)

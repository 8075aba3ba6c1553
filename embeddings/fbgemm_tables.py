"""Tables over fbgemm's fused kernels: the way tables live on CUDA, and a second opinion on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from typing_extensions import override

from embeddings.initial_rows import initial_rows
from embeddings.interface import TableRows, Tables
from embeddings.jagged import Jagged, read_jagged
from embeddings.row_optimizers import RowOptimizer, RowSGD
from embeddings.tables import TableConfig

if TYPE_CHECKING:
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen


@dataclass(frozen=True)
class _Group:
    """Tables that one fbgemm module can hold: it knows one pooling and one optimizer."""

    optimizer: RowOptimizer
    tables: list[int]
    features: list[int]
    kernel: SplitTableBatchedEmbeddingBagsCodegen


class FbgemmTables(Tables):
    """Tables of float32 rows on the CPU or on CUDA, updated by fbgemm inside backward.

    Args:
        configs: The tables.
        device: Where the rows live.
        seed: See ``build_tables``.

    Raises:
        ValueError: When fbgemm cannot do what a table asks for: weight decay on the CPU or under SGD, or a dim that
            is not a multiple of 4.
    """

    def __init__(self, configs: Sequence[TableConfig], *, device: torch.device | str = "cpu", seed: int = 0) -> None:
        super().__init__(configs)
        self.device = torch.device(device)
        for config in configs:
            _check_supported(config, self.device)
        # Not registered as submodules: fbgemm's weights are parameters, which the dense optimizer must not find.
        self._groups: tuple[_Group, ...] = tuple(self._make_groups())
        for rows in self.rows():
            rows.weight.copy_(initial_rows(rows.config, seed=seed))
        limits = [self.table_configs[t].num_rows for t in self.feature_tables]
        self._limits = torch.tensor(limits, dtype=torch.int64, device=self.device)

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        keys = features.keys()
        positions = [keys.index(name) for name in self.feature_names if name in keys]
        if len(positions) == len(self.feature_names) and positions != list(range(len(keys))):
            features = features.permute(positions)
        self._check_ids(read_jagged(features, self.feature_names))
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self.keyed(self._look_up(features))

    @override
    def set_learning_rate_factor(self, factor: float) -> None:
        for group in self._groups:
            group.kernel.set_learning_rate(group.optimizer.learning_rate * factor)

    @override
    def rows(self) -> Iterator[TableRows]:
        found: dict[int, TableRows] = {}
        for group in self._groups:
            weights = group.kernel.split_embedding_weights()
            has_state = not isinstance(group.optimizer, RowSGD)
            states = group.kernel.split_optimizer_states() if has_state else [[None]] * len(weights)
            for table, weight, state in zip(group.tables, weights, states, strict=True):
                named = {"sum_of_squares": state[0]} if has_state else {}
                found[table] = TableRows(self.table_configs[table], weight, named)
        for table in range(len(self.table_configs)):
            yield found[table]

    def _make_groups(self) -> Iterator[_Group]:
        by_kind: dict[tuple[str, RowOptimizer], list[int]] = {}
        for table, config in enumerate(self.table_configs):
            by_kind.setdefault((config.pooling, config.optimizer), []).append(table)
        for (_, optimizer), tables in by_kind.items():
            features = [f for f, table in enumerate(self.feature_tables) if table in tables]
            feature_table_map = [tables.index(self.feature_tables[f]) for f in features]
            kernel = _make_kernel([self.table_configs[t] for t in tables], feature_table_map, self.device)
            yield _Group(optimizer, tables, features, kernel)

    def _look_up(self, features: KeyedJaggedTensor) -> Tensor:
        if len(self._groups) == 1:
            (group,) = self._groups
            pooled: Tensor = group.kernel(features.values().long(), features.offsets().long())
            return pooled
        columns: dict[int, Tensor] = {}
        for group in self._groups:
            part = features.permute(group.features)
            pooled = group.kernel(part.values().long(), part.offsets().long())
            parts = torch.split(pooled, [self.feature_dims[f] for f in group.features], dim=1)
            columns.update(zip(group.features, parts, strict=True))
        return torch.cat([columns[f] for f in range(len(self.feature_names))], dim=1)

    def _check_ids(self, batch: Jagged) -> None:
        # fbgemm's own check replaces a wrong id by 0, or on CUDA stops the process.
        counts = torch.tensor(batch.ids_per_feature, device=self.device)
        limits = torch.repeat_interleave(self._limits, counts, output_size=batch.ids.numel())
        outside = (batch.ids < 0) | (batch.ids >= limits)
        if bool(outside.any()):
            at = int(outside.nonzero()[0])
            feature = int(torch.searchsorted(counts.cumsum(0), at, right=True))
            raise self.id_error(batch, feature, at)


def _check_supported(config: TableConfig, device: torch.device) -> None:
    decay = config.optimizer.weight_decay
    # On the CPU fbgemm takes a weight decay and does nothing with it.
    if decay and (device.type == "cpu" or isinstance(config.optimizer, RowSGD)):
        kind = type(config.optimizer).__name__
        raise ValueError(
            f"table {config.name!r}: expected {kind} without weight_decay, got {decay}: fbgemm has none "
            f"for it on {device}; use kernel 'numba', or RowWiseAdagrad on CUDA"
        )
    if config.dim % 4:
        raise ValueError(f"table {config.name!r}: expected dim to be a multiple of 4 for fbgemm, got {config.dim}")


def _make_kernel(
    configs: Sequence[TableConfig], feature_table_map: list[int], device: torch.device
) -> SplitTableBatchedEmbeddingBagsCodegen:
    # Imported here: loading fbgemm takes seconds, and the CPU's own kernels do without it.
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
        WeightDecayMode,
    )

    on_cuda = device.type == "cuda"
    location = EmbeddingLocation.DEVICE if on_cuda else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if on_cuda else ComputeDevice.CPU
    optimizer = configs[0].optimizer
    settings: dict[str, Any] = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": optimizer.learning_rate}
    if not isinstance(optimizer, RowSGD):
        settings |= {
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "weight_decay_mode": WeightDecayMode.L2 if optimizer.weight_decay else WeightDecayMode.NONE,
        }
    return SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(config.num_rows, config.dim, location, compute) for config in configs],
        feature_table_map=feature_table_map,
        weights_precision=SparseType.FP32,
        stochastic_rounding=False,
        pooling_mode=PoolingMode.SUM if configs[0].pooling == "sum" else PoolingMode.MEAN,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=device,
        table_names=[config.name for config in configs],
        **settings,
    )

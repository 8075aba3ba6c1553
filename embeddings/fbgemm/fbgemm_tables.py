"""Tables over fbgemm's fused kernels: the way tables live on CUDA, and a second opinion on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from typing_extensions import override

from embeddings.fbgemm.fbgemm_settings import (
    check_build,
    check_supported,
    kernel_settings,
    set_eps,
    shared_learning_rate,
)
from embeddings.fbgemm.late_check import LateCheck, as_jagged, read_features, take_keys
from embeddings.initial_rows import initial_rows
from embeddings.interface import TableRows, Tables
from embeddings.jagged import Jagged
from embeddings.row_optimizers import counts_updates, state_columns
from embeddings.tables import Pooling, TableConfig

if TYPE_CHECKING:
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

_INT32_ROWS = 1 << 31


@dataclass(frozen=True)
class _Group:
    """Tables that one fbgemm module can hold: it knows one of each of their settings, and one learning rate."""

    tables: list[int]
    features: list[int]
    kernel: SplitTableBatchedEmbeddingBagsCodegen
    is_mean: bool
    updates: Tensor  # [] float64 on the CPU: backward passes so far, the same for all of its tables


class FbgemmTables(Tables):
    """Tables on the CPU or on CUDA, updated by fbgemm inside backward.

    On CUDA no call waits for the GPU: an id outside its table is found out by ``check_ids``, or else at the next
    call, and was looked up as id 0. Under autocast to bf16 there, pooled vectors come out in bf16, summed in float32.

    Args:
        configs: The tables.
        device: Where the rows live.
        seed: See ``build_tables``.

    Raises:
        ValueError: When fbgemm cannot do what a table asks for.
    """

    def __init__(self, configs: Sequence[TableConfig], *, device: torch.device | str = "cpu", seed: int = 0) -> None:
        super().__init__(configs)
        self.device = torch.device(device)
        check_build(self.device)
        for config in configs:
            check_supported(config, self.device)
        # Not registered as submodules: fbgemm's weights are parameters, which the dense optimizer must not find.
        self._groups: tuple[_Group, ...] = tuple(self._make_groups())
        for rows in self.rows():
            rows.weight.copy_(initial_rows(rows.config, seed=seed))
        limits = [self.table_configs[t].num_rows for t in self.feature_tables]
        self._check = LateCheck(torch.tensor(limits, device=self.device))

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        self._raise_for_earlier_batch()
        features = read_features(features, self.feature_names)
        batch = as_jagged(features)
        ids = self._check.begin(batch)
        if self.device.type == "cpu":
            self.check_ids()
        with self.stopwatch.stage("lookup"), torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self.keyed(self._look_up(ids, batch, features.weights_or_none()))

    @override
    def check_ids(self) -> None:
        if (wrong := self._check.finish()) is not None:
            raise self.id_error(*wrong)

    @override
    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        self.check_factors(factors)
        for group in self._groups:
            configs = [self.table_configs[t] for t in group.tables]
            group.kernel.set_learning_rate(shared_learning_rate(configs, [factors[t] for t in group.tables]))

    @override
    def set_eps_factor(self, factor: float) -> None:
        for group in self._groups:
            set_eps(group.kernel, self.table_configs[group.tables[0]], factor)

    @override
    def rows(self) -> Iterator[TableRows]:
        if hasattr(self, "_check"):
            self._raise_for_earlier_batch()
        found: dict[int, TableRows] = {}
        for group in self._groups:
            config = self.table_configs[group.tables[0]]
            # What a cache holds is written back, and dropped in case the rows are changed from outside.
            group.kernel.flush()
            group.kernel.reset_cache_states()
            names = tuple(state_columns(config.optimizer))
            states = group.kernel.split_optimizer_states() if names else [[]] * len(group.tables)
            weights = group.kernel.split_embedding_weights()
            for table, weight, state in zip(group.tables, weights, states, strict=True):
                named = dict(zip(names, state, strict=True))
                if counts_updates(config.optimizer, config.row_type):
                    named["updates"] = group.updates
                found[table] = TableRows(self.table_configs[table], weight, named)
        for table in range(len(self.table_configs)):
            yield found[table]

    def _raise_for_earlier_batch(self) -> None:
        # Of a plain kind, so that nobody looks for the id in the batch at hand.
        if (wrong := self._check.finish()) is not None:
            raise ValueError(f"in an earlier batch: {self.id_error(*wrong)}")

    def _make_groups(self) -> Iterator[_Group]:
        by_kind: dict[tuple[object, ...], list[int]] = {}
        for table, config in enumerate(self.table_configs):
            kind = (config.pooling, config.optimizer, config.row_type, config.memory, config.group)
            by_kind.setdefault(kind, []).append(table)
        for (pooling, *_), tables in by_kind.items():
            features = [f for f, table in enumerate(self.feature_tables) if table in tables]
            feature_table_map = [tables.index(self.feature_tables[f]) for f in features]
            kernel = make_kernel([self.table_configs[t] for t in tables], feature_table_map, self.device)
            yield _Group(tables, features, kernel, pooling == "mean", torch.zeros((), dtype=torch.float64))

    def _look_up(self, ids: Tensor, batch: Jagged, weights: Tensor | None) -> Tensor:
        if len(self._groups) == 1:
            return _call(self._groups[0], ids, batch.offsets, weights)
        # Keeps how many ids each feature has, so that taking features out need not ask the GPU.
        whole = KeyedJaggedTensor(
            keys=list(self.feature_names),
            values=ids,
            weights=weights,
            offsets=batch.offsets,
            stride=batch.batch_size,
            length_per_key=batch.ids_per_feature,
        )
        columns: dict[int, Tensor] = {}
        for group in self._groups:
            part = take_keys(whole, tuple(group.features))
            pooled = _call(group, part.values(), part.offsets(), part.weights_or_none())
            parts = torch.split(pooled, [self.feature_dims[f] for f in group.features], dim=1)
            columns.update(zip(group.features, parts, strict=True))
        return torch.cat([columns[f] for f in range(len(self.feature_names))], dim=1)


def make_kernel(
    configs: Sequence[TableConfig], feature_table_map: list[int], device: torch.device
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """Makes the fbgemm module of tables of one kind, with rows that are not set yet."""
    # Imported here: loading fbgemm takes seconds, and the CPU's own kernels do without it.
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_cuda = device.type == "cuda"
    memory = {"device": "DEVICE", "uvm": "MANAGED", "uvm_caching": "MANAGED_CACHING"}[configs[0].memory]
    location = EmbeddingLocation[memory] if on_cuda else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if on_cuda else ComputeDevice.CPU
    return SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(config.num_rows, config.dim, location, compute) for config in configs],
        feature_table_map=feature_table_map,
        pooling_mode=pooling_mode(configs[0].pooling),
        bounds_check_mode=BoundsCheckMode.NONE,
        device=device,
        table_names=[config.name for config in configs],
        # Moments are as large as the rows: where those do not fit, these do not either.
        uvm_non_rowwise_momentum=configs[0].memory != "device",
        **kernel_settings(configs[0]),
    )


def _call(group: _Group, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    kernel = group.kernel
    if not ids.is_cuda or kernel.total_hash_size >= _INT32_ROWS:
        ids = ids.long()
    if ids.is_cuda:
        _set_output_type(kernel)
    set_updates(kernel, int(group.updates))
    kernel.pooling_mode = pooling_mode("mean" if group.is_mean and weights is None else "sum")
    if weights is not None:
        weights = weights.float() / _lengths_by_id(offsets, len(ids)) if group.is_mean else weights.float()
    pooled: Tensor = kernel(ids, offsets.to(ids.dtype), weights)
    if pooled.requires_grad:
        pooled.register_hook(count_updates(group.updates))
    return pooled


def _lengths_by_id(offsets: Tensor, num_ids: int) -> Tensor:
    # fbgemm's CPU kernels leave the division of a weighted mean out of its gradient.
    lengths = offsets.diff()
    return torch.repeat_interleave(lengths, lengths, output_size=num_ids)


def pooling_mode(pooling: Pooling) -> Any:
    """Says a pooling in fbgemm's words."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

    return PoolingMode.SUM if pooling == "sum" else PoolingMode.MEAN


def count_updates(updates: Tensor) -> Callable[[Tensor], None]:
    """Makes a hook for pooled vectors that counts how often a gradient comes back to them."""

    def count(_: Tensor) -> None:
        updates.add_(1)

    return count


def _set_output_type(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    from fbgemm_gpu.split_embedding_configs import SparseType

    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
    kernel.output_dtype = (SparseType.BF16 if half else SparseType.FP32).as_int()


def set_updates(kernel: SplitTableBatchedEmbeddingBagsCodegen, updates: int) -> None:
    """Tells fbgemm's Adam and LAMB how many updates there were."""
    # fbgemm counts every call, those of evaluations too, and where it has come to 0 reads the counter on the GPU.
    if updates == 0:
        kernel.iter.zero_()
    kernel.iter_cpu.fill_(updates)

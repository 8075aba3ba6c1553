"""Tables over several ranks by torchrec's sharded collection and fbgemm's kernels: the way they are sharded on CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from typing_extensions import override

from embeddings.fbgemm.fbgemm_settings import (
    check_build,
    check_supported,
    kernel_settings,
    set_eps,
    shared_learning_rate,
)
from embeddings.fbgemm.fbgemm_tables import count_updates, set_updates
from embeddings.fbgemm.late_check import LateCheck, as_jagged, read_features
from embeddings.fbgemm.torchrec_plan import fit_plan, parameter_sharding
from embeddings.initial_rows import initial_rows
from embeddings.interface import TableRows, Tables
from embeddings.row_optimizers import counts_updates, state_columns
from embeddings.shards import ShardingPlan
from embeddings.tables import TableConfig

_HALF_GRADIENT_SCALE = 4096.0
"""Gradients of a mean over a large batch are too small for fp16; where they come to 16, they are too large."""


class _Ahead(NamedTuple):
    """A batch whose ids are under way."""

    features: KeyedJaggedTensor
    context: Any
    ids: Any


class TorchrecTables(Tables):
    """Shards of tables, on the CPU over gloo or on CUDA over NCCL, looked up and updated by fbgemm.

    A gradient is that of the loss as it stands: each rank's loss is its part of the mean over the global batch, and
    gradients are summed over ranks. torchrec would divide them by the number of ranks; that is switched off for the
    whole process.

    An id outside its table is found out by ``check_ids``, or else at the next call, and looked up as id 0 until then:
    this rank must do its part of what others wait for. Each shard of columns has its own sum of squares under row-wise
    Adagrad, the mean over its columns and not over the row: there alone, it trains other rows than one process does.
    So do LAMB's ratios.

    Args:
        configs: The tables.
        plan: What lies where; ``notes`` says what torchrec cannot do of it, and ``plan`` what is done instead.
        device: Where this rank's rows live.
        seed: See ``build_tables``.
        exchange: Type in which rows and gradients travel.

    Raises:
        ValueError: When fbgemm or torchrec cannot do what a table or its plan asks for.
    """

    def __init__(
        self,
        configs: Sequence[TableConfig],
        *,
        plan: ShardingPlan,
        device: torch.device | str = "cpu",
        seed: int = 0,
        exchange: str = "fp32",
    ) -> None:
        super().__init__(configs)
        self.device = torch.device(device)
        if self.device == torch.device("cuda"):
            # torchrec compares devices, and one without a number equals none of its own.
            self.device = torch.device("cuda", torch.cuda.current_device())
        plan.check(configs)
        check_build(self.device)
        for config in configs:
            check_supported(config, self.device)
        _check_process(plan, self.device, exchange)
        self.plan, self.notes = fit_plan(plan, configs)
        # Not registered as submodules: fbgemm's weights are parameters, which the dense optimizer must not find.
        self._sharded: tuple[Any, ...] = (_shard(configs, self.plan, self.device, exchange),)
        self._updates = torch.zeros((), dtype=torch.float64)
        self.set_learning_rate_factors([1.0] * len(configs))
        limits = [self.table_configs[t].num_rows for t in self.feature_tables]
        self._check = LateCheck(torch.tensor(limits, device=self.device))
        self._is_mean = [self.table_configs[t].pooling == "mean" for t in self.feature_tables]
        self._permute: Any = None
        self._ahead: _Ahead | None = None
        for rows in self.rows():
            part = initial_rows(
                rows.config,
                seed=seed,
                first_row=rows.first_row,
                num_rows=rows.weight.shape[0],
                first_column=rows.first_column,
                num_columns=rows.weight.shape[1],
            )
            rows.weight.copy_(part)

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        (sharded,) = self._sharded
        if self._ahead is None or self._ahead.features is not features:
            self.prefetch(features)
        ahead, self._ahead = self._ahead, None
        assert ahead is not None
        with self.stopwatch.stage("ids all-to-all"):
            ids = ahead.ids.wait()
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            for _, kernel in self._kernels():
                set_updates(kernel, int(self._updates))
            with self.stopwatch.stage("lookup"):
                pooled = sharded.compute_and_output_dist(ahead.context, ids)
            with self.stopwatch.stage("rows all-to-all"):
                pooled = pooled.wait()
            values = self._scale_means(self._in_order(pooled)[: features.stride()], features)
        if values.requires_grad:
            values.register_hook(count_updates(self._updates))
        return self.keyed(values)

    @override
    def prefetch(self, features: KeyedJaggedTensor) -> None:
        self._raise_for_earlier_batch()
        read = read_features(features, self.feature_names)
        batch = as_jagged(read)
        ids = self._check.begin(batch)
        (sharded,) = self._sharded
        context = sharded.create_context()
        with self.stopwatch.stage("ids all-to-all"):
            # Gloo gathers what is of one size only, and NCCL does so faster: ranks with fewer bags add empty ones.
            size = _largest(batch.batch_size, self.device)
            lengths = read.lengths().view(len(self.feature_names), batch.batch_size)
            checked = KeyedJaggedTensor(
                keys=list(self.feature_names),
                values=ids,
                weights=read.weights_or_none(),
                lengths=nn.functional.pad(lengths, (0, size - batch.batch_size)).flatten(),
                stride=size,
                length_per_key=batch.ids_per_feature,
            )
            # The first wait is for how many ids come from whom; it starts the exchange of the ids themselves.
            self._ahead = _Ahead(features, context, sharded.input_dist(context, checked).wait())

    @override
    def check_ids(self) -> None:
        if (wrong := self._check.finish()) is not None:
            raise self.id_error(*wrong)

    @override
    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        self.check_factors(factors)
        of = {config.name: (config, factor) for config, factor in zip(self.table_configs, factors, strict=True)}
        for tables, kernel in self._kernels():
            configs, shared = zip(*(of[table.name] for table in tables), strict=True)
            kernel.set_learning_rate(shared_learning_rate(configs, shared))

    @override
    def set_eps_factor(self, factor: float) -> None:
        of = {config.name: config for config in self.table_configs}
        for tables, kernel in self._kernels():
            set_eps(kernel, of[tables[0].name], factor)

    @override
    def rows(self) -> Iterator[TableRows]:
        if self._ahead is None:  # what is only under way has not been looked up
            self._raise_for_earlier_batch()
        by_name = {config.name: config for config in self.table_configs}
        found: dict[str, list[TableRows]] = {name: [] for name in by_name}
        for tables, kernel in self._kernels():
            # What a cache holds is written back, and dropped in case the rows are changed from outside.
            kernel.flush()
            kernel.reset_cache_states()
            names = tuple(state_columns(by_name[tables[0].name].optimizer))
            states = kernel.split_optimizer_states() if names else [[]] * len(tables)
            for table, weight, state in zip(tables, kernel.split_embedding_weights(), states, strict=True):
                config, place = by_name[table.name], table.local_metadata.shard_offsets
                named = dict(zip(names, state, strict=True))
                if counts_updates(config.optimizer, config.row_type):
                    named["updates"] = self._updates
                found[table.name].append(TableRows(config, weight, named, place[0], place[1]))
        for name in by_name:
            yield from found[name]

    def _kernels(self) -> Iterator[tuple[list[Any], Any]]:
        """Gives each fbgemm module of this rank with the shards that it holds."""
        for lookup in self._sharded[0]._lookups:
            for module in lookup._emb_modules:
                yield module._config.embedding_tables, module.emb_module

    def _raise_for_earlier_batch(self) -> None:
        # Of a plain kind, so that nobody looks for the id in the batch at hand.
        if (wrong := self._check.finish()) is not None:
            raise ValueError(f"in an earlier batch: {self.id_error(*wrong)}")

    def _in_order(self, pooled: KeyedTensor) -> Tensor:
        keys: list[str] = pooled.keys()
        values: Tensor = pooled.values()
        if keys == list(self.feature_names):
            return values
        if self._permute is None:
            from fbgemm_gpu.permute_pooled_embedding_modules import PermutePooledEmbeddings

            places = [keys.index(name) for name in self.feature_names]
            self._permute = PermutePooledEmbeddings(pooled.length_per_key(), places, device=self.device)
        ordered: Tensor = self._permute(values)
        return ordered

    def _scale_means(self, pooled: Tensor, features: KeyedJaggedTensor) -> Tensor:
        # torchrec's own means are off by a part in a million, and with weights they are other means.
        if not any(self._is_mean):
            return pooled
        keys, stride = features.keys(), features.stride()
        lengths = features.lengths().view(len(keys), stride)
        ones = torch.ones(stride, device=pooled.device)
        scales = [
            ones / lengths[keys.index(name)].clamp(min=1) if is_mean else ones
            for name, is_mean in zip(self.feature_names, self._is_mean, strict=True)
        ]
        widths = torch.tensor(self.feature_dims, device=pooled.device)
        return pooled * torch.stack(scales, dim=1).repeat_interleave(widths, dim=1, output_size=pooled.shape[1])


def _largest(number: int, device: torch.device) -> int:
    numbers = torch.tensor(number, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def _check_process(plan: ShardingPlan, device: torch.device, exchange: str) -> None:
    from torchrec.distributed.comm import get_local_size

    if not dist.is_initialized() or dist.get_world_size() != plan.ranks:
        running = dist.get_world_size() if dist.is_initialized() else "none"
        raise ValueError(f"plan: expected {plan.ranks} ranks of torch.distributed to be running, got {running}")
    within_nodes = [table.table for table in plan.tables if table.sharding in ("table_row_wise", "grid")]
    if within_nodes and get_local_size(plan.ranks) != plan.ranks_per_node:
        raise ValueError(
            f"table {within_nodes[0]!r}: expected the environment's LOCAL_WORLD_SIZE to be {plan.ranks_per_node} as in "
            f"the plan, got {get_local_size(plan.ranks)}; torchrun sets it"
        )
    if exchange == "bf16" and device.type == "cpu":
        raise ValueError("exchange: expected 'fp32' or 'fp16' for torchrec over gloo, got 'bf16'")


def _shard(configs: Sequence[TableConfig], plan: ShardingPlan, device: torch.device, exchange: str) -> Any:
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
    from torchrec.distributed import comm_ops
    from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
    from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
    from torchrec.distributed.types import ShardingEnv
    from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    comm_ops.set_gradient_division(False)
    whole = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=config.name,
                num_embeddings=config.num_rows,
                embedding_dim=config.dim,
                feature_names=list(config.features),
                data_type=DataType[config.row_type.upper()],
            )
            for config in configs
        ],
        device=torch.device("meta"),
    )
    parameters = dict(whole.named_parameters())
    groups = sorted({config.group for config in configs})
    for config in configs:
        settings = kernel_settings(config)
        del settings["weights_precision"]  # follows from data_type
        # Tables of the same settings come into one kernel; the rates themselves are set once the kernels are there.
        settings["learning_rate"] += groups.index(config.group)
        parameter: Any = parameters[f"embedding_bags.{config.name}.weight"]
        parameter._optimizer_classes, parameter._optimizer_kwargs = [None], [settings]
    half = exchange != "fp32"
    travel = QCommsConfig(
        forward_precision=CommType(exchange),
        backward_precision=CommType(exchange),
        backward_loss_scale=_HALF_GRADIENT_SCALE if exchange == "fp16" else None,
    )
    return ShardedEmbeddingBagCollection(
        whole,
        {
            config.name: parameter_sharding(config, table, device.type, plan.ranks_per_node)
            for config, table in zip(configs, plan.tables, strict=True)
        },
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        fused_params={"bounds_check_mode": BoundsCheckMode.NONE},
        device=device,
        qcomm_codecs_registry=get_qcomm_codecs_registry(travel, device=device) if half else None,
    )

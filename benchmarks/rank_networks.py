"""The click network of `click_networks` spread over ranks: ours, and torchrec's as its documentation would have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch as TorchrecBatch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM as TorchrecDLRM
from torchrec.models.dlrm import DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad as TorchrecRowWiseAdagrad

from benchmarks.click_networks import (
    BATCH_SIZE,
    BOTTOM,
    DIM,
    LEARNING_RATE,
    NAMES,
    NUM_NUMERIC,
    NUM_ROWS,
    NUM_TABLES,
    TOP,
    Ids,
)
from dlrm.batch import Batch
from dlrm.distributed.parallelize import DenseReducer
from dlrm.distributed.ranks import Ranks
from dlrm.model import DLRM
from dlrm.training.train_step import ClickTask, TrainStep
from embeddings import RowWiseAdagrad, ShardingPlan, TableConfig
from embeddings.shards import Exchange

Step = Callable[[int], float]


def take_share(batch: Ids, rank: int, ranks: int) -> Ids:
    """Cut one rank's samples out of a global batch."""
    first, last = BATCH_SIZE * rank // ranks, BATCH_SIZE * (rank + 1) // ranks
    lengths = batch.lengths.view(NUM_TABLES, BATCH_SIZE)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), batch.lengths.cumsum(0)])
    starts = [int(ends[table * BATCH_SIZE + first]) for table in range(NUM_TABLES)]
    stops = [int(ends[table * BATCH_SIZE + last]) for table in range(NUM_TABLES)]
    return Ids(
        dense=batch.dense[first:last].clone(),
        values=torch.cat([batch.values[start:stop] for start, stop in zip(starts, stops, strict=True)]),
        lengths=lengths[:, first:last].reshape(-1).contiguous(),
        labels=batch.labels[first:last].clone(),
    )


class _AnySharding(EmbeddingBagCollectionSharder):
    """Offers what is asked for: torchrec's own has row-wise for GPUs only, though it runs over gloo as well."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [self._kind]


def build_torchrec(batches: list[Ids], kind: str) -> Step:
    """Build torchrec's `DistributedModelParallel` over fbgemm's tables, fused row-wise Adagrad; `kind` of sharding."""
    tables = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=name, embedding_dim=DIM, num_embeddings=NUM_ROWS, feature_names=[name])
            for name in NAMES
        ],
        device=torch.device("meta"),
    )
    apply_optimizer_in_backward(TorchrecRowWiseAdagrad, tables.parameters(), {"lr": LEARNING_RATE})
    task = DLRMTrain(TorchrecDLRM(tables, NUM_NUMERIC, BOTTOM, TOP))
    sharders: list[nn.Module] = [_AnySharding(kind)]
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"))
    plan = planner.collective_plan(task, sharders, dist.group.WORLD)
    model = DistributedModelParallel(task, device=torch.device("cpu"), sharders=sharders, plan=plan)
    dense = [parameter for name, parameter in model.named_parameters() if "embedding_bags" not in name]
    optimizer = torch.optim.SGD(dense, lr=LEARNING_RATE)

    def train(number: int) -> float:
        ids = batches[number % len(batches)]
        batch = TorchrecBatch(dense_features=ids.dense, sparse_features=ids.keyed(), labels=ids.labels)
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return train


def build_ours(batches: list[Ids], plan: ShardingPlan | None, exchange: Exchange = "fp32") -> tuple[Step, Any]:
    """Build ours, with its dense gradients summed over ranks; without a plan, for a process of its own."""
    ranks = Ranks() if plan is None else Ranks(rank=dist.get_rank(), count=plan.ranks, per_node=plan.ranks)
    model = DLRM(
        num_numeric=NUM_NUMERIC,
        tables=describe_tables(),
        dim=DIM,
        bottom=BOTTOM[:-1],
        top=TOP[:-1],
        plan=plan,
        exchange=exchange,
    )
    parameters = list(model.parameters())
    step = TrainStep(
        ClickTask(model),
        torch.optim.SGD(parameters, lr=LEARNING_RATE),
        split="benchmark",
        reducer=DenseReducer(parameters, ranks) if plan is not None else None,
    )
    ready: list[Batch] = []

    def make(number: int) -> Batch:
        ids = batches[number % len(batches)]
        rows = torch.arange(len(ids.labels))
        batch = Batch(dense=ids.dense, sparse=ids.keyed(), labels=ids.labels, rows=rows, global_size=BATCH_SIZE)
        model.tables.prefetch(batch.sparse)
        return batch

    def train(number: int) -> float:
        batch = ready.pop() if ready else make(number)
        ready.append(make(number + 1))  # its ids travel while this one is trained
        return step(batch, (number + 1) * BATCH_SIZE)

    return train, model.tables


def describe_tables() -> list[TableConfig]:
    """Describe the tables of `click_networks`."""
    optimizer = RowWiseAdagrad(learning_rate=LEARNING_RATE)
    return [TableConfig(name=name, num_rows=NUM_ROWS, dim=DIM, optimizer=optimizer) for name in NAMES]

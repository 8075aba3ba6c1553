"""A step's time as the sum of its parts: the dense part against the real model, stages against formulas, scaling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dlrm.config import ModelConfig, TablesConfig
from dlrm.data.dataset import DatasetInfo, FeatureInfo
from dlrm.descriptions import describe_tables
from dlrm.model import build_dlrm
from dlrm.planning.dense_cost import DenseCost, dense_cost
from dlrm.planning.foresee import STAGES, Foresight, foresee
from dlrm.planning.simulate import parse_counts, simulate
from embeddings import RowWiseAdagrad, ShardingPlan, TableConfig
from embeddings.planning.collectives import all_reduce_seconds, all_to_all_seconds
from embeddings.planning.machine import CPU, MACHINES
from embeddings.planning.plan import plan_tables
from embeddings.planning.table_cost import Setting, shard_bytes
from embeddings.usage import Usage

CONFIGS = [
    TableConfig(name=f"t{i}", num_rows=10 ** (3 + i), dim=16, optimizer=RowWiseAdagrad(learning_rate=0.1))
    for i in range(4)
]
DENSE = dense_cost(ModelConfig(), 13, [16] * 4)


def look_ahead(ranks: int, batch: int = 4096, **machine: object) -> Foresight:
    setting = Setting(
        machine=replace(CPU, **machine), usage=Usage(global_batch_size=batch), ranks=ranks, ranks_per_node=min(ranks, 8)
    )
    plan = plan_tables(CONFIGS, ranks=ranks, ranks_per_node=min(ranks, 8), statistics=setting.usage)
    return foresee(CONFIGS, plan, DENSE, setting)


@pytest.mark.parametrize("interaction", ["dot", "dcn", "fm", "projection"])
@pytest.mark.parametrize("numeric", [0, 5])
def test_the_dense_part_is_counted_as_it_is_built(interaction: str, numeric: int) -> None:
    model = ModelConfig(dim=8, bottom=(16,), top=(32, 8), interaction=interaction, cross_rank=4)
    features = tuple(FeatureInfo(name=f"f{i}", num_rows=10) for i in range(3))
    info = DatasetInfo(numeric=tuple(f"n{i}" for i in range(numeric)), features=features, splits={})
    built = build_dlrm(info, model, TablesConfig(), seed=0, device="cpu")
    parameters = [p for name, p in built.named_parameters() if not name.startswith("tables.")]
    counted = dense_cost(model, numeric, [8] * 3)
    assert counted.parameters == sum(p.numel() for p in parameters)
    layers = [module for module in built.modules() if isinstance(module, torch.nn.Linear)]
    assert counted.flops >= sum(2 * layer.weight.numel() for layer in layers)
    assert counted.numbers >= sum(layer.out_features for layer in layers)


def test_a_step_is_the_sum_over_stages_of_the_slowest_rank() -> None:
    found = look_ahead(4)
    assert found.by_rank.shape == (4, len(STAGES))
    assert found.seconds == pytest.approx(found.by_rank.max(axis=0).sum())
    assert list(found.stages) == list(STAGES)
    assert found.samples_per_second == pytest.approx(4096 / found.seconds)
    assert all(found.imbalance(stage) >= 1 for stage in range(len(STAGES)))
    assert found.bytes_by_table.sum(axis=0).tolist() == found.bytes_by_rank.tolist()
    copied = shard_bytes(CONFIGS[0], 1000, 16)
    assert found.bytes_by_rank.sum() == sum(shard_bytes(c, c.num_rows, 16) for c in CONFIGS) + 3 * copied


def test_one_rank_sends_nothing() -> None:
    stages = look_ahead(1).stages
    travels = ("ids all-to-all", "rows all-to-all", "gradients all-to-all", "exposed all-reduce")
    cut = 4 * 4096 * CPU.cut_seconds_per_id
    assert [stages[name] for name in travels] == pytest.approx([cut, 0, 0, 0])
    assert stages["all else"] == CPU.seconds_per_step


def test_latencies_are_those_of_the_messages() -> None:
    slow = replace(CPU.near, latency_seconds=1.0)
    shared, sent = look_ahead(2, near=slow).stages, look_ahead(2, near=slow, shares_memory=False).stages
    assert [round(sent[name]) for name in STAGES[:3]] == [2, 0, 1]
    assert [round(shared[name]) for name in STAGES[:3]] == [2, 0, 1]  # a barrier of two ranks is one message
    four = look_ahead(4, near=slow, shares_memory=False).stages["rows all-to-all"]
    assert round(four) == 3
    assert round(look_ahead(4, near=slow).stages["rows all-to-all"]) == 2


def test_the_all_reduce_hides_behind_the_backward_pass_but_for_its_last_bucket() -> None:
    machine = MACHINES["a100"]
    dense = DenseCost(flops=10**9, numbers=0, parameters=10 << 18)  # ten buckets of a MiB
    setting = Setting(machine=machine, usage=Usage(global_batch_size=65536), ranks=8, ranks_per_node=8)
    plan = ShardingPlan(ranks=8, ranks_per_node=8, tables=())
    bucket = all_reduce_seconds(machine, 8, 8, 1 << 20)
    assert foresee([], plan, dense, setting).stages["exposed all-reduce"] == pytest.approx(bucket)
    open_ = foresee([], plan, dense, replace(setting, machine=replace(machine, overlap=0.0)))
    assert open_.stages["exposed all-reduce"] == pytest.approx(10 * bucket)


def test_ranks_that_share_cores_take_longer() -> None:
    alone, shared = look_ahead(4), look_ahead(4, cores_per_node=2)
    assert shared.seconds == pytest.approx(2 * alone.seconds)


def test_vectors_between_nodes_are_sent() -> None:
    found = look_ahead(16, batch=1 << 16)
    least = all_to_all_seconds(CPU, 16, 8, 0)
    # Of all vectors, each rank's share, and of that the half that goes to the other node.
    vectors = 3 * (1 << 16) * 64 / 16 * 8 / 16 / CPU.far.bytes_per_second
    assert found.stages["rows all-to-all"] >= (least + vectors) * (1 - 1e-9)


def test_scaling_compares_with_one_rank() -> None:
    asked: list[tuple[int, int]] = []

    def answer(ranks: int, batch: int) -> Foresight:
        asked.append((ranks, batch))
        if ranks == 3:
            raise ValueError("tables do not fit: no")
        return look_ahead(ranks, batch)

    found = simulate([1, 2, 3, 4096], answer, ranks=4, global_batch_size=1024)
    assert asked[:2] == [(1, 256), (1, 1024)]
    one, two, three, many = found
    assert one.weak_efficiency == one.strong_efficiency == 1
    assert two.weak is not None
    assert two.weak.setting.usage.global_batch_size == 512
    expected = two.weak.samples_per_second / 2 / look_ahead(1, 256).samples_per_second
    assert two.weak_efficiency == pytest.approx(expected)
    assert three.misfit == "tables do not fit: no"
    assert three.weak is None
    assert many.weak is not None
    assert many.strong is None  # fewer samples than ranks


def test_counts_are_sorted_once_each() -> None:
    assert parse_counts("64, 8,8 1", 8) == [1, 8, 64]
    assert parse_counts("3", 8) == [3]
    assert np.isfinite(look_ahead(3).seconds)


def test_tables_are_described_as_the_flags_say() -> None:
    info = DatasetInfo(numeric=(), features=(FeatureInfo(name="a", num_rows=7),), splits={})
    (table,) = describe_tables(info, 12, TablesConfig(optimizer="sgd", learning_rate=0.5, row_type="bf16"))
    assert (table.name, table.num_rows, table.dim, table.row_type) == ("a", 7, 12, "bf16")
    assert table.optimizer.learning_rate == 0.5

"""fbgemm's tables on a GPU train as plain tables in float64 do, in every memory; what a CPU can do of it runs there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import (
    IdOutOfRangeError,
    RowAdagrad,
    RowAdam,
    RowLamb,
    RowOptimizer,
    RowSGD,
    RowWiseAdagrad,
    TableConfig,
)
from embeddings.build import build_tables
from embeddings.interface import Tables

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
OPTIMIZERS: dict[str, RowOptimizer] = {
    "sgd": RowSGD(learning_rate=0.1),
    "adagrad": RowAdagrad(learning_rate=0.1, eps=1e-3),
    "rowwise": RowWiseAdagrad(learning_rate=0.1, eps=1e-3),
    "rowwise with decay": RowWiseAdagrad(learning_rate=0.1, eps=1e-3, weight_decay=0.1),
    "adam": RowAdam(learning_rate=0.05, eps=1e-3, weight_decay=0.1),
    "lamb": RowLamb(learning_rate=0.05, eps=1e-3, weight_decay=0.1),
    "partial lamb": RowLamb(learning_rate=0.05, eps=1e-3, partial=True),
}
ON_CPU = ("sgd", "adagrad", "rowwise")  # what fbgemm has there


MEMORIES = ("device", "uvm", "uvm_caching")
PLACES = [
    *((name, "device", "cpu") for name in ON_CPU),
    *(pytest.param(name, memory, "cuda", marks=pytest.mark.gpu) for name in OPTIMIZERS for memory in MEMORIES),
]


def tables_like(optimizer: RowOptimizer, **settings: Any) -> list[TableConfig]:
    """Tables in three groups, by pooling and by name; the cache of the first is a fifth of its rows."""
    common = {"optimizer": optimizer, "init_scale": 0.5, **settings}
    return [
        TableConfig(name="a", num_rows=2000, dim=8, **common),
        TableConfig(name="b", num_rows=7, dim=8, pooling="mean", features=("x", "y"), **common),
        TableConfig(name="c", num_rows=50, dim=16, group="small", **common),
    ]


@contextmanager
def nobody_waits(device: str) -> Iterator[None]:
    """Makes it an error of torch's to wait for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on(device: str, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Copies a batch as training does: asked for its ids per feature beforehand."""
    features.length_per_key()
    return features.to(torch.device(device))


@pytest.mark.parametrize(("optimizer", "memory", "device"), PLACES)
def test_twenty_steps_equal_plain_tables(
    optimizer, memory, device, plain_tables, assert_equals_plain, draw_bags, keyed_jagged
):
    configs = tables_like(OPTIMIZERS[optimizer], memory=memory)
    tables = build_tables(configs, seed=1, kernel="fbgemm", device=device)
    plain = plain_tables(tables)
    random = np.random.default_rng(0)
    for step in range(20):
        bags = draw_bags(configs, batch_size=40, longest=6, random=random)
        factors = [1 / (1 + step), 2 / (1 + step), 3 / (1 + step)]
        tables.set_learning_rate_factors(factors)
        target = torch.from_numpy(random.normal(size=(40, sum(tables.feature_dims))))
        pooled = tables(on(device, keyed_jagged(bags))).values()
        expected = plain.look_up(bags)
        torch.testing.assert_close(pooled.cpu().double(), expected, rtol=1e-4, atol=1e-5)
        (pooled - target.to(device).float()).square().sum().backward()
        (expected - target).square().sum().backward()
        plain.update(bags, factors)
        if step == 10:  # rows are read, and written back from a cache, in between
            tables.load_state_dict({name: tensor.clone() for name, tensor in tables.state_dict().items()})
        if step % 3 == 0:  # an evaluation is no update
            tables.eval()(on(device, keyed_jagged(bags)))
            tables.train()
    assert_equals_plain(tables, plain)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_training_waits_for_no_gpu(device, dtype, draw_bags, keyed_jagged):
    """Several groups, features in another order and among others: what a step needs of the CPU is there beforehand."""
    configs = [
        *tables_like(RowWiseAdagrad(learning_rate=0.1)),
        TableConfig(name="d", num_rows=9, dim=8, optimizer=RowSGD(learning_rate=0.1)),
    ]
    tables = build_tables(configs, kernel="fbgemm", device=device)
    before = [rows.weight.clone() for rows in tables.rows()]
    random = np.random.default_rng(0)
    bags = draw_bags(configs, batch_size=40, longest=6, random=random) | {"other": [[1]] * 40}
    features = on(device, keyed_jagged(dict(reversed(bags.items())), dtype))

    def step() -> None:
        tables.set_learning_rate_factors([0.5] * len(configs))
        tables(features).values().sum().backward()

    step()
    tables.check_ids()
    with nobody_waits(device):
        step()
    tables.check_ids()
    assert all(not torch.equal(rows.weight, start) for rows, start in zip(tables.rows(), before, strict=True))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_weighted_bags_equal_plain_tables(
    device, plain_tables, assert_equals_plain, draw_bags, draw_weights, keyed_jagged
):
    configs = tables_like(RowWiseAdagrad(learning_rate=0.1, eps=1e-3))
    tables = build_tables(configs, seed=2, kernel="fbgemm", device=device)
    plain = plain_tables(tables)
    random = np.random.default_rng(1)
    for _ in range(5):
        bags = draw_bags(configs, batch_size=8, longest=4, random=random)
        weights = draw_weights(bags, random)
        pooled = tables(on(device, keyed_jagged(bags, weights=weights))).values()
        expected = plain.look_up(bags, weights)
        torch.testing.assert_close(pooled.cpu().double(), expected, rtol=1e-4, atol=1e-5)
        pooled.sin().sum().backward()
        expected.sin().sum().backward()
        plain.update(bags)
    assert_equals_plain(tables, plain)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_wrong_id_is_named(device, keyed_jagged):
    tables = build_tables([TableConfig(name="a", num_rows=9, dim=8)], kernel="fbgemm", device=device)

    def look_up_and_check(ids: list[list[int]]) -> torch.Tensor:
        pooled = tables(on(device, keyed_jagged({"a": ids}))).values()
        tables.check_ids()
        return pooled

    with pytest.raises(IdOutOfRangeError, match=r"row 1 of the batch: expected an id in \[0, 9\) .*, got 9;"):
        look_up_and_check([[1], [9]])
    assert look_up_and_check([[1], [8]]).isfinite().all()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_batches_and_bags_may_be_empty(device, keyed_jagged):
    tables = build_tables(tables_like(RowSGD(learning_rate=1.0)), kernel="fbgemm", device=device)
    before = [rows.weight.clone() for rows in tables.rows()]
    pooled = tables(on(device, keyed_jagged({"a": [[], []], "x": [[], []], "y": [[], []], "c": [[], []]}))).values()
    pooled.sum().backward()
    tables.check_ids()
    assert pooled.shape == (2, 40)
    assert not pooled.any()
    assert all(torch.equal(rows.weight, start) for rows, start in zip(tables.rows(), before, strict=True))


def drift_of_small_updates(tables: Tables, features: KeyedJaggedTensor, steps: int) -> tuple[float, float]:
    """Says how far rows have come on average, and how far they should have, by updates below half a unit of 16 bits."""
    (rows,) = tables.rows()
    rows.weight.fill_(1.0)
    for _ in range(steps):
        (tables(features).values().sum() * 1e-4).backward()
    return float((1.0 - next(tables.rows()).weight.double()).mean()), steps * 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_of_16_bits_round_without_bias(memory):
    config = TableConfig(
        name="a", num_rows=500, dim=64, row_type="fp16", memory=memory, optimizer=RowSGD(learning_rate=1.0)
    )
    tables = build_tables([config], kernel="fbgemm", device="cuda")
    ids = KeyedJaggedTensor(["a"], torch.arange(500), lengths=torch.ones(500, dtype=torch.int64))
    moved, expected = drift_of_small_updates(tables, on("cuda", ids), steps=20)
    assert next(tables.rows()).weight.dtype == torch.float16
    # 32,000 numbers, each of 20 updates a fifth of a unit: its mean has a standard error of 0.5 %
    assert moved == pytest.approx(expected, rel=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_of_16_bits_follow_plain_tables(optimizer, plain_tables, assert_equals_plain, draw_bags, keyed_jagged):
    configs = tables_like(OPTIMIZERS[optimizer], row_type="fp16")
    tables = build_tables(configs, seed=1, kernel="fbgemm", device="cuda")
    plain = plain_tables(tables)
    random = np.random.default_rng(0)
    for _ in range(10):
        bags = draw_bags(configs, batch_size=40, longest=4, random=random)
        tables(on("cuda", keyed_jagged(bags))).values().sin().sum().backward()
        plain.look_up(bags).sin().sum().backward()
        plain.update(bags)
    assert_equals_plain(tables, plain, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
def test_autocast_gives_pooled_vectors_of_16_bits_and_keeps_rows_exact(draw_bags, keyed_jagged):
    configs = tables_like(RowWiseAdagrad(learning_rate=0.1))
    pooled, ends = {}, {}
    for half in (False, True):
        tables = build_tables(configs, seed=1, kernel="fbgemm", device="cuda")
        bags = draw_bags(configs, batch_size=40, longest=6, random=np.random.default_rng(0))
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            pooled[half] = tables(on("cuda", keyed_jagged(bags))).values()
        pooled[half].float().sum().backward()
        ends[half] = [rows.weight.clone() for rows in tables.rows()]
    assert (pooled[False].dtype, pooled[True].dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(pooled[True].float(), pooled[False], rtol=1e-2, atol=1e-2)
    for one, other in zip(ends[True], ends[False], strict=True):  # gradients of 1 are the same in both types
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MEMORIES)
def test_equal_seeds_give_equal_rows_on_both_devices(memory):
    configs = tables_like(RowSGD(learning_rate=0.1))
    on_cpu = build_tables(configs, seed=3)
    on_gpu = build_tables([replace(config, memory=memory) for config in configs], seed=3, device="cuda")
    for ours, theirs in zip(on_cpu.rows(), on_gpu.rows(), strict=True):
        assert torch.equal(ours.weight, theirs.weight.cpu())

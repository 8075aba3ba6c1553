"""Rows on demand learn as those of local tables do, bit for bit, with every optimizer that updates rows one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.hashed.hashed_table import HashedTable
from embeddings.local.local_rows import Bags, LocalRows, whole_table

OPTIMIZERS = {
    "sgd": RowSGD(learning_rate=0.1, weight_decay=0.1),
    "adagrad": RowAdagrad(learning_rate=0.1, weight_decay=0.1),
    "row-wise adagrad": RowWiseAdagrad(learning_rate=0.1, weight_decay=0.1),
    "adam": RowAdam(learning_rate=0.02, weight_decay=0.1),
    "lamb": RowLamb(learning_rate=0.02, weight_decay=0.1),
    "partial lamb": RowLamb(learning_rate=0.02, partial=True),
    "lazy cowclip": RowCowClip(learning_rate=0.02, clip=0.2, l2=0.05, l2_mode="lazy"),
}
STEPS, ROWS = 20, 300


def update_local(local, ids, gradients):
    cells = torch.arange(len(ids) + 1)
    segments = np.array([[0, 0, len(ids), 0, gradients.shape[1]]])
    bags = Bags(ids=torch.from_numpy(ids), offsets=cells, weights=None, segments=segments)
    local.update(bags, torch.from_numpy(gradients).reshape(-1))


@pytest.mark.parametrize("dim", [5, 64])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_learns_as_local_tables_do(kind, dim):
    config = TableConfig(name="a", num_rows=ROWS, dim=dim, optimizer=OPTIMIZERS[kind])
    local, table = LocalRows([whole_table(config)], seed=3), HashedTable(config, seed=3, salt=np.uint64(9))
    random = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        factor, eps_factor = random.uniform(0.5, 2, 2)
        local.set_learning_rate_factors([factor])
        local.set_eps_factor(eps_factor)
        ids = random.permutation(ROWS)[: random.integers(1, 150)]
        twice = ids[::2]
        gradients = random.normal(size=(ids.size + twice.size, dim)).astype(np.float32)
        update_local(local, np.concatenate([ids, twice]), gradients)
        sums, counts = gradients[: ids.size].copy(), np.ones(ids.size, np.int64)
        sums[::2] += gradients[ids.size :]
        counts[::2] = 2
        table.push(ids, sums, updates=step, factor=factor, eps_factor=eps_factor, now=1.0, counts=counts)
    (expected,) = local.rows()
    weight, state = table.read_rows(np.arange(ROWS))
    assert np.array_equal(weight, expected.weight.numpy())
    assert table.num_rows > ROWS // 2
    assert state.keys() == expected.state.keys() - {"updates"}
    for name, values in state.items():
        assert np.array_equal(values, expected.state[name].numpy()), name


def test_gradients_of_16_bits_are_widened():
    config = TableConfig(name="a", num_rows=ROWS, dim=19)
    one, other = (HashedTable(config, seed=0, salt=np.uint64(0)) for _ in range(2))
    ids = np.arange(0, ROWS, 2)
    gradients = np.random.default_rng(0).normal(size=(ids.size, 19)).astype(np.float16)
    one.push(ids, gradients, updates=1, now=1.0)
    other.push(ids, gradients.astype(np.float32), updates=1, now=1.0)
    assert np.array_equal(one.take().rows.view(np.uint32), other.take().rows.view(np.uint32))


@pytest.mark.parametrize("dim", [3, 16, 37, 64])
def test_rows_are_rounded_to_nearest_in_16_bits(dim):
    config = TableConfig(name="a", num_rows=ROWS, dim=dim, init_scale=1e5)
    table, ids = HashedTable(config, seed=0, salt=np.uint64(0)), np.random.default_rng(0).permutation(ROWS)
    table.push(ids[:200], np.zeros((200, dim), np.float32), updates=1, now=1.0)
    wide, narrow = np.empty((ROWS, dim), np.float32), np.empty((ROWS, dim), np.float16)
    table.pull(ids, wide)
    table.pull(ids, narrow)
    with np.errstate(over="ignore"):
        assert np.array_equal(narrow, wide.astype(np.float16))


@pytest.mark.parametrize(
    "optimizer",
    [
        RowLamb(learning_rate=0.1, trust="table"),
        RowLamb(learning_rate=0.1, trust="touched"),
        RowCowClip(learning_rate=0.1),
    ],
)
def test_an_optimizer_that_needs_other_rows_is_refused(optimizer):
    config = TableConfig(name="a", num_rows=10, dim=4, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"table 'a': expected an optimizer .* RowLamb\(trust='row'\)"):
        HashedTable(config, seed=0, salt=np.uint64(0))


def test_rows_of_16_bits_are_refused():
    with pytest.raises(ValueError, match="expected row_type 'fp32' for rows on demand, got 'bf16'"):
        HashedTable(TableConfig(name="a", num_rows=10, dim=4, row_type="bf16"), seed=0, salt=np.uint64(0))

"""Rectangles of a table train as the whole table does, however it is cut, with sums exchanged where it takes them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch

from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.initial_rows import initial_rows
from embeddings.local.local_rows import Bags, LocalRows, RowsPart, rounds_needed, whole_table

OPTIMIZERS = {
    "sgd": (RowSGD(learning_rate=0.1, weight_decay=0.1), 0),
    "adagrad": (RowAdagrad(learning_rate=0.1, weight_decay=0.1, eps=1e-3), 0),
    "row-wise adagrad": (RowWiseAdagrad(learning_rate=0.1, weight_decay=0.1), 1),
    "adam": (RowAdam(learning_rate=0.02, weight_decay=0.1, eps=1e-3), 0),
    "lamb": (RowLamb(learning_rate=0.02, weight_decay=0.1, eps=1e-3), 1),
    "partial lamb": (RowLamb(learning_rate=0.02, partial=True, eps=1e-3), 2),
    "lamb over touched rows": (RowLamb(learning_rate=0.02, trust="touched", eps=1e-3), 1),
    "partial lamb over touched rows": (RowLamb(learning_rate=0.02, trust="touched", partial=True, eps=1e-3), 2),
    "lamb over the table": (RowLamb(learning_rate=0.02, trust="table", weight_decay=0.1, eps=1e-3), 1),
    "partial lamb over the table": (RowLamb(learning_rate=0.02, trust="table", partial=True, eps=1e-3), 2),
    "cowclip": (RowCowClip(learning_rate=0.02, eps=1e-3, clip=0.2, l2=0.05), 1),
    "lazy cowclip": (RowCowClip(learning_rate=0.02, eps=1e-3, clip=0.2, l2=0.05, l2_mode="lazy"), 1),
}
# edges between the shards' rows, and between their columns
CUTS = {
    "columns": ([0, 30], [0, 3, 10]),
    "rows": ([0, 1, 30], [0, 10]),
    "grid": ([0, 17, 30], [0, 5, 6, 10]),
}


class SumsInOneProcess:
    """Adds up what threads give, each of which stands for a rank that holds one rectangle."""

    def __init__(self, parts, rounds):
        self.parts, self.rounds = parts, rounds
        self.given = [None] * len(parts)
        self.barrier = threading.Barrier(len(parts), timeout=60)
        self.kinds = set()

    def of(self, rank):
        return _OneRanksSums(self, rank)


class _OneRanksSums:
    def __init__(self, shared, rank):
        self.shared, self.rank, self.rounds, self.seen = shared, rank, shared.rounds, []

    def exchange(self, round, over_columns, over_table):
        shared, mine = self.shared, self.shared.parts[self.rank]
        self.seen.append(round)
        shared.given[self.rank] = (over_columns, over_table)
        shared.barrier.wait()
        columns, table = {}, {}
        if over_columns:
            shared.kinds.add(("columns", round))
            same_rows = [i for i, part in enumerate(shared.parts) if part.first_row == mine.first_row]
            columns = {0: sum(shared.given[i][0][0] for i in same_rows)}
        if over_table:
            shared.kinds.add(("table", round))
            table = {0: sum(given[1][0] for given in shared.given)}
        shared.barrier.wait()
        return columns, table


def _bags_of(ids, lengths, part, stride):
    """The bags that hold ids of a part, from two lists as two other ranks would send them, in batch order."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    inside = (ids >= part.first_row) & (ids < part.first_row + part.num_rows)
    counts = [int(inside[first:last].sum()) for first, last in pairwise(offsets.tolist())]
    half = len(lengths) // 2
    segments = [
        (0, 0, half, part.first_column, stride),
        (0, half, len(lengths) - half, half * stride + part.first_column, stride),
    ]
    return Bags(
        ids=torch.from_numpy(ids[inside] - part.first_row),
        offsets=torch.tensor([0, *np.cumsum(counts).tolist()]),
        weights=None,
        segments=np.array(segments),
    )


def _batches(config, number):
    random = np.random.default_rng(0)
    for _ in range(number):
        lengths = random.integers(0, 4, 12)
        gradient = torch.from_numpy(random.normal(size=(12, config.dim)).astype(np.float32))
        yield random.integers(0, config.num_rows, int(lengths.sum())), lengths, gradient


@pytest.mark.parametrize("row_type", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_table_that_is_cut_trains_as_the_whole_one(name, cut, row_type):
    optimizer, rounds = OPTIMIZERS[name]
    config = TableConfig(name="a", num_rows=30, dim=10, optimizer=optimizer, row_type=row_type, init_scale=1.0)
    row_edges, column_edges = CUTS[cut]
    parts = [
        RowsPart(config, row, row_end - row, column, column_end - column)
        for row, row_end in pairwise(row_edges)
        for column, column_end in pairwise(column_edges)
    ]
    whole = LocalRows([whole_table(config)], seed=3)
    ranks = [LocalRows([part], seed=3) for part in parts]
    for ids, lengths, gradient in _batches(config, 8):
        whole.update(_bags_of(ids, lengths, whole.parts[0], config.dim), gradient)
        sums = SumsInOneProcess(parts, rounds_needed(optimizer))
        assert sums.rounds == rounds
        views = [sums.of(rank) for rank in range(len(ranks))]
        with ThreadPoolExecutor(len(ranks)) as threads:
            updates = [
                threads.submit(rows.update, _bags_of(ids, lengths, part, config.dim), gradient, view)
                for rows, part, view in zip(ranks, parts, views, strict=True)
            ]
            for update in updates:
                update.result(60)
        assert all(view.seen == list(range(rounds)) for view in views)
        one_ratio = "over" in name
        over_columns = {("columns", r) for r in range(rounds - one_ratio) if cut != "rows"}
        assert sums.kinds == over_columns | ({("table", rounds - 1)} if one_ratio else set())
    expected = next(whole.rows())
    # 16 bits: where the sums differ in the last place, a number may go up in one and down in the other
    loose = {"rtol": 0, "atol": 0.02} if row_type == "bf16" else {"rtol": 1e-6, "atol": 1e-6}
    for rows in ranks:
        mine = next(rows.rows())
        last_row, last_column = mine.first_row + mine.weight.shape[0], mine.first_column + mine.weight.shape[1]
        rectangle = expected.weight[mine.first_row : last_row, mine.first_column : last_column]
        torch.testing.assert_close(mine.weight, rectangle, **loose)
        if row_type == "bf16":
            assert (mine.weight != rectangle).float().mean() < 0.05
        for state, tensor in mine.state.items():
            of_whole = expected.state[state]
            if tensor.dim():
                of_whole = of_whole[mine.first_row : last_row]
            if tensor.dim() == 2:
                of_whole = of_whole[:, mine.first_column : last_column]
            torch.testing.assert_close(tensor, of_whole, **loose)


@pytest.mark.parametrize("name", ["row-wise adagrad", "lamb over touched rows"])
def test_a_cut_table_without_its_sums_is_refused(name):
    config = TableConfig(name="a", num_rows=30, dim=10, optimizer=OPTIMIZERS[name][0])
    part = RowsPart(config, 0, 30, 0, 5)
    ids, lengths, gradient = next(_batches(config, 1))
    with pytest.raises(ValueError, match="expected more than 0 rounds of sums over split tables, got 0"):
        LocalRows([part]).update(_bags_of(ids, lengths, part, config.dim), gradient)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_summed_gradients_applied_equal_an_update(name, pooling):
    config = TableConfig(name="a", num_rows=30, dim=10, optimizer=OPTIMIZERS[name][0], pooling=pooling)
    updated = LocalRows([whole_table(config)], seed=3)
    copy = LocalRows([whole_table(config)._replace(is_replicated=True)], seed=3)
    for ids, lengths, gradient in _batches(config, 5):
        bags = _bags_of(ids, lengths, updated.parts[0], config.dim)
        updated.update(bags, gradient)
        out = torch.zeros(30, 11)
        copy.update(bags, gradient)  # leaves it alone
        copy.sum_gradients(0, bags, gradient, out)
        assert out[:, 10].tolist() == np.bincount(ids, minlength=30).tolist()
        before = out.clone()
        copy.apply(0, out)
        assert torch.equal(out, before)
    for mine, expected in zip(copy.rows(), updated.rows(), strict=True):
        torch.testing.assert_close(mine.weight, expected.weight, rtol=1e-5, atol=1e-6)
        assert list(mine.state) == list(expected.state)
        for state, tensor in mine.state.items():
            torch.testing.assert_close(tensor, expected.state[state], rtol=1e-5, atol=1e-6)


def test_only_replicated_parts_are_summed_and_applied():
    config = TableConfig(name="a", num_rows=30, dim=10)
    rows = LocalRows([whole_table(config)])
    ids, lengths, gradient = next(_batches(config, 1))
    with pytest.raises(ValueError, match="table 'a': expected a part with is_replicated=True"):
        rows.sum_gradients(0, _bags_of(ids, lengths, rows.parts[0], 10), gradient, torch.zeros(30, 11))
    with pytest.raises(ValueError, match="table 'a': expected a part with is_replicated=True"):
        rows.apply(0, torch.zeros(30, 11))


def test_cells_lie_where_segments_say_and_nothing_else_is_written():
    configs = [TableConfig(name=name, num_rows=5, dim=dim, init_scale=1.0) for name, dim in (("a", 3), ("b", 2))]
    rows = LocalRows([whole_table(config) for config in configs], seed=1)
    a, b = (row.weight for row in rows.rows())
    bags = Bags(
        ids=torch.tensor([0, 1, 4, 2, 3], dtype=torch.int32),
        offsets=torch.tensor([0, 2, 2, 3, 5]),
        weights=torch.tensor([1, 2, 3, -1, 0.5]),
        segments=np.array([(0, 2, 1, 20, 7), (0, 0, 1, 0, 7), (1, 1, 1, 9, 1), (1, 3, 1, 5, 1)]),
    )
    out = torch.full((24,), 7.0)
    assert rows.look_up(bags, out) == -1
    expected = torch.full((24,), 7.0)
    expected[20:23] = 3 * a[4]
    expected[0:3] = a[0] + 2 * a[1]
    expected[9:11] = 0
    expected[5:7] = -b[2] + 0.5 * b[3]
    torch.testing.assert_close(out, expected)
    wrong = Bags(ids=torch.tensor([0, 1, 4, 9, -1]), offsets=bags.offsets, weights=None, segments=bags.segments)
    assert rows.look_up(wrong, out) == 3


@pytest.mark.parametrize("dim", [1, 7, 8, 16])
def test_a_rectangles_first_rows_are_those_of_the_whole_table(dim):
    config = TableConfig(name="a", num_rows=300_000, dim=dim)
    whole = initial_rows(config, seed=3)
    for first_row, num_rows, first_column, num_columns in [
        (0, 5, 0, dim),
        (299_990, 10, 0, dim),
        (12_345, 280_000, dim // 2, dim - dim // 2),
        (3, 1, dim - 1, 1),
    ]:
        part = initial_rows(
            config,
            seed=3,
            first_row=first_row,
            num_rows=num_rows,
            first_column=first_column,
            num_columns=num_columns,
        )
        expected = whole[first_row : first_row + num_rows, first_column : first_column + num_columns]
        assert torch.equal(part, expected)

"""How many distinct rows ids have, and where they lie, against draws."""

from __future__ import annotations

import numpy as np
import pytest

from embeddings import RowWiseAdagrad, TableConfig
from embeddings.usage import TableUsage, Usage


def test_evenly_drawn_ids_have_as_many_distinct_rows_as_a_draw() -> None:
    usage, random = TableUsage(ids_per_sample=1, bags_per_sample=1), np.random.default_rng(0)
    for ids, rows in ((10, 1_000_000), (1000, 1000), (5000, 1000), (10_000, 3)):
        found = np.mean([len(np.unique(random.integers(0, rows, ids))) for _ in range(20)])
        assert usage.distinct_rows(ids, rows) == pytest.approx(found, rel=0.02)
    assert usage.distinct_rows(0, 10) == 0
    assert usage.distinct_rows(1, 10) == 1
    assert usage.distinct_rows(100, 1) == 1


def test_counted_ones_are_met_and_go_on_beyond_the_last() -> None:
    usage = TableUsage(ids_per_sample=1, bags_per_sample=1, distinct=((100.0, 50.0), (10_000.0, 500.0)))
    assert usage.distinct_rows(100, 10**6) == pytest.approx(50)
    assert usage.distinct_rows(10_000, 10**6) == pytest.approx(500)
    assert usage.distinct_rows(1_000, 10**6) == pytest.approx((50 * 500) ** 0.5)
    assert usage.distinct_rows(1_000_000, 10**6) == pytest.approx(5_000)
    assert usage.distinct_rows(1_000_000, 700) == 700
    counts = [usage.distinct_rows(ids, 10**6) for ids in (0.5, 1, 2, 10, 1e3, 1e5, 1e9)]
    assert counts == sorted(counts)


def test_shares_of_rows_add_up_and_follow_the_traffic() -> None:
    random = np.random.default_rng(1)
    ids = np.minimum(random.geometric(0.02, 20_000) - 1, 399)
    traffic = tuple(np.concatenate([[0.0], np.cumsum(np.bincount(ids, minlength=400)) / len(ids)]).tolist())
    usage = TableUsage(ids_per_sample=1, bags_per_sample=1, traffic=traffic)
    first, count = np.array([0, 10, 100]), np.array([10, 90, 300])
    found = [((ids >= low) & (ids < low + n)).mean() for low, n in zip(first, count, strict=True)]
    assert usage.share_of_rows(first, count, 400) == pytest.approx(found)
    assert usage.share_of_rows(first, count, 400).sum() == pytest.approx(1)
    even = TableUsage(ids_per_sample=1, bags_per_sample=1)
    assert even.share_of_rows(first, count, 400) == pytest.approx([0.025, 0.225, 0.75])


def test_a_table_that_nobody_knows_has_one_id_per_feature() -> None:
    config = TableConfig(name="t", num_rows=9, dim=4, features=("a", "b"), optimizer=RowWiseAdagrad(learning_rate=0.1))
    assert Usage().of(config) == TableUsage(ids_per_sample=2, bags_per_sample=2)
    known = TableUsage(ids_per_sample=0.0, bags_per_sample=0.0)
    assert Usage(tables={"t": known}).of(config) is known

"""A batch over rows that came from elsewhere gives, bit for bit, what it gives over tables in this process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embeddings import RowSGD, TableConfig
from embeddings.local.local_rows import Bags, LocalRows, whole_table
from embeddings.unique_rows import find_unique_rows

CONFIGS = [
    TableConfig(name="a", num_rows=60, dim=24, optimizer=RowSGD(learning_rate=1.0)),
    TableConfig(name="b", num_rows=7, dim=5, pooling="mean", optimizer=RowSGD(learning_rate=1.0)),
    TableConfig(name="c", num_rows=9, dim=1, optimizer=RowSGD(learning_rate=1.0)),
]
TABLE_OF = (0, 0, 1, 2)  # of each feature
MEANS = [config.pooling == "mean" for config in CONFIGS]
DIMS = [config.dim for config in CONFIGS]


def draw_bags(random: np.random.Generator, batch: int, *, weighted: bool, longest: int = 4) -> Bags:
    counts = random.integers(0, longest + 1, len(TABLE_OF) * batch)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ends = offsets[np.arange(len(TABLE_OF) + 1) * batch]
    ids = np.concatenate(
        [random.integers(0, CONFIGS[t].num_rows, ends[f + 1] - ends[f]) for f, t in enumerate(TABLE_OF)]
    )
    widths = [CONFIGS[t].dim for t in TABLE_OF]
    columns = np.cumsum([0, *widths])
    segments = [(t, f * batch, batch, columns[f], columns[-1]) for f, t in enumerate(TABLE_OF)]
    return Bags(
        ids=torch.from_numpy(ids.astype(np.int32)),
        offsets=torch.from_numpy(offsets),
        weights=torch.from_numpy(random.normal(size=ids.size).astype(np.float32)) if weighted else None,
        segments=np.array(segments, np.int64),
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 40])
def test_looks_up_and_sums_as_local_rows_do(batch: int, weighted: bool) -> None:
    bags = draw_bags(np.random.default_rng(batch), batch, weighted=weighted)
    local = LocalRows([whole_table(config) for config in CONFIGS], seed=3)
    before = [rows.weight.clone() for rows in local.rows()]
    expected, out = torch.zeros(batch * 54), torch.zeros(batch * 54)
    assert local.look_up(bags, expected) == -1

    unique = find_unique_rows(bags, MEANS)
    unique.look_up([weight.numpy()[ids] for weight, ids in zip(before, unique.ids, strict=True)], out)
    assert torch.equal(out, expected)

    gradient = torch.randn(batch * 54)
    local.update(bags, gradient)
    sums = unique.sum_gradients(gradient, DIMS)
    for start, rows, ids, its_sums in zip(before, local.rows(), unique.ids, sums, strict=True):
        start[torch.from_numpy(ids)] -= torch.from_numpy(its_sums)  # SGD with a rate of 1
        torch.testing.assert_close(start, rows.weight, rtol=0, atol=0)


def test_finds_each_id_once_in_ascending_order_whatever_it_is() -> None:
    random = np.random.default_rng(1)
    some = random.integers(-(2**63), 2**63 - 1, 500, endpoint=True)
    ids = np.concatenate([random.choice(some, 3000), [-(2**63), 2**63 - 1, -1, 0]])
    bags = Bags(
        ids=torch.from_numpy(ids),
        offsets=torch.arange(ids.size + 1),
        weights=None,
        segments=np.array([(0, 0, ids.size, 0, 1)], np.int64),
    )
    unique = find_unique_rows(bags, [False])
    assert np.array_equal(unique.ids[0], np.unique(ids))
    assert np.array_equal(unique.ids[0][unique.bags.ids.numpy()], ids)


def test_gives_the_same_for_any_number_of_threads() -> None:
    bags, threads = draw_bags(np.random.default_rng(2), 300, weighted=True), torch.get_num_threads()
    gradient, outs, sums = torch.randn(300 * 54), [], []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            unique = find_unique_rows(bags, MEANS)
            rows = [np.random.default_rng(5).normal(size=(len(i), d)) for i, d in zip(unique.ids, DIMS, strict=True)]
            outs.append(torch.zeros(300 * 54))
            unique.look_up([table.astype(np.float32) for table in rows], outs[-1])
            sums.append(unique.sum_gradients(gradient, DIMS))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outs)
    assert all(np.array_equal(one, other) for one, other in zip(*sums, strict=True))

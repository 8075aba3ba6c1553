"""The reader gives every sample exactly once per epoch, in an order that depends on seed and position alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.batch import Batch
from dlrm.data.dataset import Bags, Dataset, DatasetInfo, FeatureInfo, Part, write_part
from dlrm.data.reader import Reader
from dlrm.distributed.ranks import Ranks

PART_ROWS = (50, 1, 33, 16)
ROWS = sum(PART_ROWS)


# The same rows as plain lists: row i is known by its number in every column.
LABELS = [number % 3 == 0 for number in range(ROWS)]
NUMBERS = [[float(number), -float(number)] for number in range(ROWS)]
SINGLE = [number * 7 % 1000 for number in range(ROWS)]
BAGS = [[number * 10 + place for place in range(number % 5)] for number in range(ROWS)]


@pytest.fixture(scope="module", params=["int32", "int64"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("reader")
    infos, first = [], 0
    num_rows = 2000 if request.param == "int32" else 2**33
    for index, count in enumerate(PART_ROWS):
        here = slice(first, first + count)
        bags = BAGS[here]
        part = Part(
            label=np.array(LABELS[here], dtype=np.uint8),
            numeric=np.array(NUMBERS[here], dtype=np.float32),
            features={
                "single": np.array(SINGLE[here], dtype=request.param),
                "list": Bags(
                    offsets=np.cumsum([0] + [len(bag) for bag in bags]),
                    values=np.array([row for bag in bags for row in bag], dtype=np.int32),
                ),
            },
            extra={"time": np.arange(first, first + count) * 2.0},
        )
        infos.append(write_part(folder, "train", index, part))
        first += count
    features = (FeatureInfo(name="single", num_rows=num_rows), FeatureInfo(name="list", num_rows=2000, is_list=True))
    DatasetInfo(numeric=("a", "b"), features=features, splits={"train": tuple(infos)}, extra=("time",)).write(folder)
    return Dataset(folder)


def check_columns(batch: Batch) -> list[int]:
    """Check that every column holds what its row should, and return the rows."""
    rows = batch.rows.tolist()
    assert batch.dense.dtype == batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [float(LABELS[row]) for row in rows]
    assert batch.dense.tolist() == [NUMBERS[row] for row in rows]
    sparse = batch.sparse.to_dict()
    assert sparse["single"].values().tolist() == [SINGLE[row] for row in rows]
    assert sparse["single"].lengths().tolist() == [1] * len(rows)
    assert sparse["list"].lengths().tolist() == [len(BAGS[row]) for row in rows]
    assert sparse["list"].values().tolist() == [id for row in rows for id in BAGS[row]]
    return rows


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 100, 1000])
def test_every_sample_once_per_epoch(dataset: Dataset, shuffle: bool, batch_size: int) -> None:
    reader = Reader(dataset, "train", shuffle=shuffle, seed=3)
    rows: list[int] = []
    for batch in reader.batches(batch_size, stop=3 * ROWS):
        assert len(batch) <= batch_size
        rows += check_columns(batch)
    for epoch in range(3):
        assert sorted(rows[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))
    if shuffle:
        assert len({tuple(rows[epoch * ROWS : (epoch + 1) * ROWS]) for epoch in range(3)}) == 3
    else:
        assert rows == 3 * list(range(ROWS))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), [(2, 7), (3, 100), (5, 3), (4, 1000)])
def test_shares_of_ranks_make_up_every_batch(dataset: Dataset, shuffle: bool, count: int, batch_size: int) -> None:
    def read(share: Callable[[int], tuple[int, int]] | None) -> list[Batch]:
        reader = Reader(dataset, "train", shuffle=shuffle, seed=3)
        return list(reader.batches(batch_size, start=11, stop=11 + 2 * ROWS, share=share))

    whole = read(None)
    shares = [read(Ranks(rank=rank, count=count).share_of) for rank in range(count)]
    for batch, *parts in zip(whole, *shares, strict=True):
        # torchrec cannot take a batch of no samples apart by feature.
        assert [row for part in parts if len(part) for row in check_columns(part)] == batch.rows.tolist()
        assert {part.global_size for part in parts} == {len(batch)}
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for part in parts:
            assert part.dense.shape == (len(part), batch.dense.shape[1])
            assert part.sparse.stride() == len(part)
    assert (0 in [len(part) for parts in shares for part in parts]) == (count == 5)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 130), min_size=1, max_size=12),
    shuffle=st.booleans(),
    start=st.integers(0, 3 * ROWS),
    seed=st.integers(0, 3),
)
def test_a_sample_depends_on_its_position_alone(sizes: list[int], shuffle: bool, start: int, seed: int) -> None:
    """Reading on from anywhere, with any batch sizes, gives the same stream."""
    dataset = test_a_sample_depends_on_its_position_alone.dataset
    stream = [
        int(row)
        for b in Reader(dataset, "train", shuffle=shuffle, seed=seed).batches(ROWS, stop=16 * ROWS)
        for row in b.rows
    ]
    reader, position, rows = Reader(dataset, "train", shuffle=shuffle, seed=seed), start, []
    for size in sizes:
        batch = next(reader.batches(size, start=position))
        rows += batch.rows.tolist()
        position += len(batch)
    assert rows == stream[start:position]


@pytest.fixture(autouse=True)
def _give_dataset(dataset: Dataset) -> None:
    test_a_sample_depends_on_its_position_alone.dataset = dataset  # hypothesis and fixtures with parameters do not mix


def test_seeds_give_different_orders(dataset: Dataset) -> None:
    orders = {tuple(Reader(dataset, "train", shuffle=True, seed=seed).read(0, ROWS).rows.tolist()) for seed in range(5)}
    assert len(orders) == 5


def test_shuffling_mixes_within_parts_and_moves_parts(dataset: Dataset) -> None:
    """Rows of a part stay together in an epoch, so that reads stay within its pages."""
    bounds = np.cumsum((0, *PART_ROWS))
    first_parts, orders = set(), set()
    for epoch in range(20):
        rows = np.concatenate(
            [
                b.rows
                for b in Reader(dataset, "train", shuffle=True).batches(9, start=epoch * ROWS, stop=(epoch + 1) * ROWS)
            ]
        )
        parts = np.searchsorted(bounds, rows, side="right")
        assert len(np.flatnonzero(np.diff(parts))) == len(PART_ROWS) - 1
        first_parts.add(int(parts[0]))
        orders.add(tuple(rows[parts == 1]))
    assert len(first_parts) > 1
    assert len(orders) == 20  # a part's rows are in another order in each epoch


def test_ids_are_as_wide_as_the_tables_ask(dataset: Dataset) -> None:
    wide = dataset.info.features[0].num_rows > 2**31
    assert Reader(dataset, "train").read(0, 5).sparse.values().dtype == (torch.int64 if wide else torch.int32)


def test_empty_split_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"expected rows in the split 'test' of .*, got none"):
        Reader(dataset, "test")


def test_a_fault_in_the_thread_reaches_the_caller(tmp_path: Path) -> None:
    part = Part(
        label=np.zeros(4, np.uint8),
        numeric=np.zeros((4, 0), np.float32),
        features={"a": np.zeros(4, np.int32)},
        extra={},
    )
    infos = tuple(write_part(tmp_path, "train", index, part) for index in range(2))
    DatasetInfo(numeric=(), features=(FeatureInfo(name="a", num_rows=3),), splits={"train": infos}).write(tmp_path)
    (tmp_path / infos[1].file).write_bytes(b"ARROW1 no more")
    batches = Reader(Dataset(tmp_path), "train").batches(4)
    assert next(batches).dense.shape == (4, 0)
    with pytest.raises(ValueError, match=r"part-00001\.arrow cannot be read .*; prepare the data again"):
        next(batches)

"""The prepared folder: what is written is read back, and what is damaged is named."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest

from dlrm.data.dataset import OPEN_PARTS, Dataset, DatasetInfo, FeatureInfo, Part, write_part

COUNT = OPEN_PARTS + 3


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    infos = []
    for index in range(COUNT):
        ids = np.arange(5, dtype=np.int32) + 5 * index
        part = Part(
            label=(ids % 2).astype(np.uint8),
            numeric=np.empty((5, 0), dtype=np.float32),
            features={"id": ids},
            extra={"time": ids * 0.5},
        )
        infos.append(write_part(tmp_path, "test", index, part))
    features = (FeatureInfo(name="id", num_rows=5 * COUNT),)
    DatasetInfo(numeric=(), features=features, splits={"test": tuple(infos)}, extra=("time",)).write(tmp_path)
    return Dataset(tmp_path)


def test_columns_at_any_rows(dataset: Dataset) -> None:
    """Of more parts than are kept open."""
    rows = np.random.default_rng(0).permutation(5 * COUNT)
    np.testing.assert_array_equal(dataset.column("test", "id", rows), rows)
    np.testing.assert_array_equal(dataset.column("test", "time", rows), rows * 0.5)
    with pytest.raises(ValueError, match="expected a column with one value per row, got 'nope'; columns: id, time"):
        dataset.column("test", "nope", rows)
    assert dataset.rows("test") == 5 * COUNT
    assert dataset.rows("train") == 0


def test_few_parts_are_open_at_a_time(dataset: Dataset) -> None:
    for _ in range(2):
        for index in range(COUNT):
            assert dataset.part("test", index).label.shape == (5,)
    gc.collect()
    mapped = {line for line in Path("/proc/self/maps").read_text().splitlines() if str(dataset.folder) in line}
    assert 1 < len(mapped) <= OPEN_PARTS


def test_a_flipped_byte_is_noticed(dataset: Dataset) -> None:
    dataset.verify()
    path = dataset.folder / dataset.info.splits["test"][2].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-00002\.arrow is not what `prepare` wrote \(checksum\)"):
        Dataset(dataset.folder).verify()
    path.unlink()
    with pytest.raises(ValueError, match=r"part-00002\.arrow is not what `prepare` wrote"):
        Dataset(dataset.folder).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], r"dataset\.json is damaged"),
        (lambda text: "[]", r"dataset\.json is damaged"),
        (lambda text: text.replace('"numeric"', '"numbers"'), r"dataset\.json is damaged"),
        (lambda text: json.dumps(json.loads(text) | {"format_version": 99}), "expected format version 1, got 99"),
        (lambda text: text.replace('"rows": 5', '"rows": 6', 1), "expected 6 rows, got 5"),
    ],
)
def test_damaged_descriptions(change: object, message: str, dataset: Dataset) -> None:
    path = dataset.folder / "dataset.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        Dataset(dataset.folder).part("test", 0)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected a prepared dataset in .*, found no dataset\.json; run `recforge prepare"
    ):
        Dataset(tmp_path)


def test_fingerprint_follows_every_byte(dataset: Dataset, tmp_path: Path) -> None:
    assert Dataset(dataset.folder).fingerprint == dataset.fingerprint
    changed = Part(
        label=np.ones(5, np.uint8),
        numeric=np.empty((5, 0), np.float32),
        features={"id": np.zeros(5, np.int32)},
        extra={"time": np.zeros(5)},
    )
    info = write_part(dataset.folder, "test", 0, changed)
    splits = {"test": (info, *dataset.info.splits["test"][1:])}
    DatasetInfo(**{**dataset.info.__dict__, "splits": splits}).write(dataset.folder)
    assert Dataset(dataset.folder).fingerprint != dataset.fingerprint

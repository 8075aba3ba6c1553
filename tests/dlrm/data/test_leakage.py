"""The proof that no validation or test row has any say in what is fitted, and that the check would notice one."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dlrm.data.commands import run_prepare
from dlrm.data.dataset import Dataset, write_part
from dlrm.data.prepare import prepare
from dlrm.data.schema import CategoricalColumn, DataSchema, NumericColumn, SplitConfig

SCHEMA = DataSchema(
    format="csv",
    label="click",
    time="when",
    numeric=tuple(
        NumericColumn(name=name, transform=name, buckets=4) for name in ("log1p_standardise", "standardise", "quantile")
    ),
    categorical=(
        CategoricalColumn(name="user", min_count=2),
        CategoricalColumn(name="tags", min_count=1, is_list=True, separator=" "),
    ),
    split=SplitConfig(by="time", valid=0.2, test=0.2),
)


def write(path: Path, rows: int, training_rows: int, later_seed: int) -> Path:
    """Rows in shuffled order; those after the first `training_rows` times differ with `later_seed`."""
    lines = []
    for when in range(rows):
        draw = random.Random(when if when < training_rows else f"{later_seed} {when}")
        far = 1 if when < training_rows else 1000 * later_seed
        numbers = [f"{draw.gauss(0, 1) * far:{later_seed * 8}.6f}" for _ in range(3)]  # moves the ends of blocks too
        later = "" if when < training_rows else f"new{later_seed}_"
        user, tags = f"{later}u{draw.randint(0, 9)}", f"{later}t{draw.randint(0, 5)} t{draw.randint(0, 5)}"
        lines.append(",".join(map(str, [when, draw.randint(0, 1), *numbers, user, tags])))
    random.Random(0).shuffle(lines)
    header = ["when", "click", *(column.name for column in SCHEMA.numeric), "user", "tags"]
    path.write_text("\n".join([",".join(header), *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """Two datasets whose sources differ in every validation and test row, and in no other."""
    folder = tmp_path_factory.mktemp("leakage")
    made = []
    for seed in (1, 2):
        source = write(folder / f"{seed}.csv", rows=500, training_rows=300, later_seed=seed)
        made.append(prepare(SCHEMA, [source], folder / f"out{seed}", processes=1, block_bytes=3000))
    return made[0], made[1]


def test_later_rows_change_nothing_that_is_fitted(pair: tuple[Dataset, Dataset]) -> None:
    one, two = pair
    assert one.rows("train") == two.rows("train") == 300
    assert one.info.origin["transforms"] == two.info.origin["transforms"]
    assert one.info.origin["vocabulary"] == two.info.origin["vocabulary"]
    assert one.info.features == two.info.features
    for file in sorted((one.folder / "vocabulary").iterdir()):
        assert file.read_bytes() == (two.folder / "vocabulary" / file.name).read_bytes()
    train, test = ([read(dataset, split) for dataset in pair] for split in ("train", "test"))
    for name, column in train[0].items():
        np.testing.assert_array_equal(column, train[1][name])
    assert (test[0]["standardise"] != test[1]["standardise"]).all()


def read(dataset: Dataset, split: str) -> dict[str, np.ndarray]:
    parts = [dataset.part(split, index) for index in range(len(dataset.info.splits[split]))]
    columns = {
        name: np.concatenate([part.numeric[:, i] for part in parts]) for i, name in enumerate(dataset.info.numeric)
    }
    columns |= {name: np.concatenate([part.features[name] for part in parts]) for name in ("user", "quantile:bucket")}
    return columns | {"tags": np.concatenate([part.features["tags"].values for part in parts])}


def test_the_description_records_the_check(pair: tuple[Dataset, Dataset]) -> None:
    check = pair[0].info.origin["leakage_check"]
    assert check["fitted_rows"] == 300
    assert check["dictionaries"] == 2
    assert check["time_ranges"] == {"train": [0, 299], "valid": [300, 399], "test": [400, 499]}


def rewrite(folder: Path, change: object) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    change(description)
    (folder / "dataset.json").write_text(json.dumps(description))


def swap_parts(description: dict) -> None:
    train, test = description["splits"]["train"], description["splits"]["test"]
    train[-1], test[0] = test[0], train[-1]


def spoil_dictionary(folder: Path) -> None:
    path = folder / "vocabulary" / "user.arrow"
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all().to_pydict()
    table["count"][3] += 1  # as if a row of the test part had been counted
    batch = pa.record_batch({"value": pa.array(table["value"], pa.large_string()), "count": pa.array(table["count"])})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def spoil_numbers(folder: Path) -> None:
    """A training part whose numbers were scaled with other rows' mean."""
    part = Dataset(folder).part("train", 0)
    info = write_part(folder, "train", 0, dataclasses.replace(part, numeric=part.numeric + np.float32(0.5)))
    rewrite(folder, lambda description: description["splits"]["train"][0].update(xxh3=info.xxh3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: rewrite(folder, swap_parts), "expected the split 'valid' to begin after"),
        (lambda folder: rewrite(folder, lambda d: d["splits"]["train"].pop(0)), "expected a fit to"),
        (spoil_dictionary, "expected row 5 of feature 'user'"),
        (spoil_numbers, "to have mean 0 in the training part"),
    ],
    ids=["time", "rows", "dictionary", "transform"],
)
def test_verify_notices_leakage(spoil: object, message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.csv", rows=500, training_rows=300, later_seed=1)
    prepare(SCHEMA, [source], tmp_path / "out", processes=1, block_bytes=3000)
    assert run_prepare(["--verify", str(tmp_path / "out"), "--processes", "1"]) == 0
    spoil(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run_prepare(["--verify", str(tmp_path / "out"), "--processes", "1"])

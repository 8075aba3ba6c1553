"""Configuration files say what they mean, and what they got wrong is named by its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlrm.config import RunConfig
from dlrm.data.config_file import load_config
from dlrm.data.schema import CategoricalColumn, DataSchema, NumericColumn, SplitConfig
from dlrm.recipes import find_recipe

TEXT = """
[data]
source = ["days/*.csv", "more.csv"]
format = "csv"
label = "y"
label_threshold = 3
time = "t"
split = {by = "time", valid = 0, test = 0.25}
[data.numeric]
price = "log1p"
"share of, all" = {transform = "quantile", missing_indicator = true}
[data.categorical]
city = "dictionary"
user = {ids = "hash", num_rows = 100}
tags = {min_count = 7, is_list = true, separator = "|"}
[train]
epochs = 2
data = "elsewhere"
model = {dim = 32, top = [64, 32], interaction = "dcn"}
[train.dense]
learning_rate = 1e-4
"""


def write(folder: Path, text: str) -> Path:
    (folder / "my.toml").write_text(text)
    return folder / "my.toml"


def test_everything_is_read(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, TEXT))
    assert config.schema == DataSchema(
        format="csv",
        label="y",
        label_threshold=3.0,
        time="t",
        numeric=(
            NumericColumn(name="price", transform="log1p"),
            NumericColumn(name="share of, all", transform="quantile", missing_indicator=True),
        ),
        categorical=(
            CategoricalColumn(name="city"),
            CategoricalColumn(name="user", ids="hash", num_rows=100),
            CategoricalColumn(name="tags", min_count=7, is_list=True, separator="|"),
        ),
        split=SplitConfig(by="time", valid=0.0, test=0.25),
    )
    assert config.sources == (tmp_path / "days/*.csv", tmp_path / "more.csv")
    recipe = find_recipe(str(config.path))
    assert recipe.source == (config.schema, config.sources)
    assert recipe.config == config.run_config()
    assert recipe.config.epochs == 2.0
    assert recipe.config.data == Path("elsewhere")
    assert (recipe.config.model.dim, recipe.config.model.top, recipe.config.model.interaction) == (32, (64, 32), "dcn")
    assert recipe.config.dense.learning_rate == 1e-4
    assert recipe.config.tables == RunConfig().tables


def test_train_may_be_absent(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, TEXT[: TEXT.index("[train]")]))
    assert config.run_config() == RunConfig()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('label = "y"', "", r"\[data\] label: expected this key, found none"),
        ('label = "y"', "label = 3", r"\[data\] label: expected a text, got 3"),
        ('label = "y"', 'label = "y"\nlables = 1', r"\[data\] unknown key lables; known are format, label, "),
        ("label_threshold = 3", 'label_threshold = "3"', r"\[data\] label_threshold: expected a number, got '3'"),
        ('format = "csv"', 'format = "xlsx"', r"\[data\] format: expected one of csv, tsv, .*, got 'xlsx'"),
        ("valid = 0,", "valid = true,", r"\[data\] split.valid: expected a number, got True"),
        ("test = 0.25", "test = 1", r"\[data\] split: split: expected valid >= 0, test >= 0 and valid \+ test < 1"),
        ('price = "log1p"', 'price = "log"', r"\[data\] numeric.price.transform: expected one of none, .*, got 'log'"),
        ('price = "log1p"', "price = 1", r'\[data.numeric\] expected price = "..." or \{...\}, got 1'),
        ("num_rows = 100", "num_rows = 1", r"\[data\] categorical.user: categorical 'user': expected num_rows > 2"),
        ("num_rows = 100", "rows = 1", r"\[data\] categorical.user: unknown key rows; known are name, ids, "),
        ("min_count = 7", "min_count = 7.5", r"\[data\] categorical.tags.min_count: expected a whole number, got 7.5"),
        ("is_list = true", 'is_list = "no"', r"\[data\] categorical.tags.is_list: expected true or false, got 'no'"),
        ('["days/*.csv", "more.csv"]', "[]", r'\[data\] expected source = \["FILE", ...\], got \[\]'),
        ('["days/*.csv", "more.csv"]', "[1]", r'\[data\] expected source = \["FILE", ...\], got \[1\]'),
        (
            "[train]",
            "[training]",
            r"expected the tables \[data\] and, if need be, \[train\], found \[data\], \[training\]",
        ),
        ("[data]", "[data", "my.toml is not a TOML file: "),
        ('city = "dictionary"', 'price = "dictionary"', "schema: expected each column once, got price twice"),
    ],
)
def test_faults_of_data_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in TEXT
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(tmp_path, TEXT.replace(old, new)))
    assert str(caught.value).startswith(str(tmp_path / "my.toml"))
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 2", "epoch = 2", r"\[train\] unknown key epoch; known are epochs, "),
        ("epochs = 2", "epochs = -1", r"\[train\] --epochs: expected a number above 0, got -1"),
        ("dim = 32", 'dim = "wide"', r"\[train\] model.dim: expected a whole number, got 'wide'"),
        ("[64, 32]", "64", r"\[train\] model.top: expected a list"),
        ('"dcn"', '"attention"', r"\[train\] model.interaction: expected one of dot, .*, got 'attention'"),
        ("learning_rate = 1e-4", "rate = 1", r"\[train\] dense: unknown key rate; known are name, learning_rate, "),
    ],
)
def test_faults_of_train_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in TEXT
    config = load_config(write(tmp_path, TEXT.replace(old, new)))
    with pytest.raises(ValueError, match=message):
        config.run_config()


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected a configuration file at .*, found none; `recforge init DATA` writes"
    ):
        load_config(tmp_path / "nothing.toml")

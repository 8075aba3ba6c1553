"""`recforge init` finds label, time, numbers, ids and lists, and what it writes is taken as it is."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from dlrm.data.column_roles import find_words
from dlrm.data.commands import run_init, run_prepare
from dlrm.data.config_file import load_config
from dlrm.data.config_text import write_config
from dlrm.data.dataset import Dataset
from dlrm.data.infer import infer_schema

ROWS = 3000


def draw_log() -> dict[str, list]:
    draw = random.Random(0)
    numbers = range(ROWS)
    words = ["red", "green", "blue", "cyan", "pink", "grey"]
    return {
        "row": list(numbers),
        "timestamp": [f"2024-03-{1 + i // 200:02d} {i // 10 % 24:02d}:00:00" for i in numbers],
        "user_id": [draw.randint(1000, 1400) for _ in numbers],
        "zip_code": [f"{draw.randint(1, 99):05d}" for _ in numbers],
        "hour": [i // 10 % 24 for i in numbers],
        "city": [draw.choice(["Ulm", "Bonn", "Köln"]) for _ in numbers],
        "tags": ["|".join(draw.sample(words, draw.randint(1, 4))) for _ in numbers],
        "visits": [int(draw.paretovariate(0.8)) if draw.random() < 0.9 else None for _ in numbers],
        "price": [round(draw.lognormvariate(3, 2), 2) for _ in numbers],
        "latitude": [round(draw.uniform(47, 55), 4) for _ in numbers],
        "session": [f"{draw.getrandbits(128):032x}" for _ in numbers],
        "version": ["1"] * ROWS,
        "note": [None] * ROWS,
        "is_member": [draw.randint(0, 1) for _ in numbers],
        "clicked": [int(draw.random() < 0.2) for _ in numbers],
    }


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same log as CSV, TSV and Parquet (there with a list column)."""
    folder = tmp_path_factory.mktemp("log")
    columns = draw_log()
    table = pa.table(columns)
    pyarrow.csv.write_csv(table, folder / "log.csv")
    options = pyarrow.csv.WriteOptions(delimiter="\t", quoting_style="none")
    pyarrow.csv.write_csv(table, folder / "log.tsv", options)
    lists = pa.array([cell.split("|") for cell in columns["tags"]])
    table = table.set_column(table.column_names.index("tags"), "tags", lists)
    pq.write_table(table, folder / "log.parquet", row_group_size=700)
    return folder


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_roles_of_columns(kind: str, log: Path, tmp_path: Path) -> None:
    found = infer_schema([log / f"log.{kind}"])
    schema = found.schema
    assert (schema.format, schema.label, schema.label_threshold, schema.time) == (kind, "clicked", None, "timestamp")
    assert schema.split.by == "time"
    assert {c.name: (c.transform, c.missing_indicator) for c in schema.numeric} == {
        "visits": ("log1p_standardise", True),
        "price": ("log1p_standardise", False),
        "latitude": ("standardise", False),
    }
    assert [c.name for c in schema.categorical] == ["user_id", "zip_code", "hour", "city", "tags", "is_member"]
    tags = schema.categorical[4]
    assert (tags.is_list, tags.separator) == (True, None if kind == "parquet" else "|")
    assert {c.ids for c in schema.categorical} == {"dictionary"}
    assert found.dropped == {
        "row": "every row has another value",
        "session": "every row has another value",
        "version": "it has one value only",
        "note": "it has no values",
    }
    write_config(found, [log / f"log.{kind}"], tmp_path / "my.toml")
    assert load_config(tmp_path / "my.toml").schema == schema


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_init_then_prepare(kind: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "my.toml", tmp_path / "out"
    assert run_init([str(log / f"log.{kind}"), "--output", str(config)]) == 0
    assert "6 categorical columns" in capsys.readouterr().out
    assert run_prepare([str(config), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "user_id" in printed
    assert "values kept" in printed
    dataset = Dataset(out)
    assert sum(dataset.rows(split) for split in dataset.info.splits) == ROWS
    assert dataset.info.numeric == ("visits", "visits:missing", "price", "latitude")
    text = config.read_text()
    assert f"# {sum(draw_log()['clicked']) / ROWS:.1%} of the rows are clicks" in text
    assert "#     session: every row has another value" in text


def test_formats_infer_the_same(log: Path) -> None:
    schemas = [infer_schema([log / f"log.{kind}"]).schema for kind in ("csv", "tsv", "parquet")]
    assert len({tuple(c.name for c in schema.categorical) for schema in schemas}) == 1
    assert len({schema.numeric for schema in schemas}) == 1


def write_columns(path: Path, **columns: list) -> Path:
    pyarrow.csv.write_csv(pa.table(columns), path)
    return path


def test_ratings_become_clicks(tmp_path: Path) -> None:
    source = write_columns(tmp_path / "a.csv", user=["a", "b"] * 10, stars=[1.0, 2, 3.5, 4, 5] * 4)
    schema = infer_schema([source]).schema
    assert (schema.label, schema.label_threshold) == ("stars", 4.0)


def test_label_that_cannot_be_told(tmp_path: Path) -> None:
    source = write_columns(tmp_path / "a.csv", user=["a", "b"] * 10, is_a=[0, 1] * 10, has_b=[1, 0] * 10)
    with pytest.raises(ValueError, match=r"expected one column of 0 and 1, found is_a, has_b among .*; use --label"):
        infer_schema([source])
    schema = infer_schema([source], label="has_b").schema
    assert schema.label == "has_b"
    assert [c.name for c in schema.categorical] == ["user", "is_a"]
    with pytest.raises(ValueError, match="--label: expected one of user, is_a, has_b, got 'nope'"):
        infer_schema([source], label="nope")
    with pytest.raises(ValueError, match="--label: expected 'user' to hold 0 and 1 or ratings"):
        infer_schema([source], label="user")


def test_many_ids_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a part of the file is looked at: ids that keep coming there are taken to go on."""
    monkeypatch.setattr("dlrm.data.column_sample.SAMPLE_BYTES", 30_000)
    monkeypatch.setattr("dlrm.data.column_roles.HASH_ABOVE", 5000)
    draw = random.Random(0)
    cookies = [draw.randint(0, 10**7) for _ in range(20_000)]
    with (tmp_path / "a.csv").open("w") as file:
        file.write("click,cookie,country\n")
        for i, cookie in enumerate(cookies):
            file.write(f"{i % 2},{draw.choice(cookies[max(i - 9, 0) : i + 1] + [cookie] * 10)},{draw.randint(0, 99)}\n")
    found = infer_schema([tmp_path / "a.csv"])
    assert found.rows < 3000
    assert [(c.name, c.ids) for c in found.schema.categorical] == [("cookie", "hash"), ("country", "dictionary")]
    assert found.schema.categorical[0].num_rows == 1_000_000


def test_real_files(shared_data: Path, tmp_path: Path) -> None:
    movielens = infer_schema([shared_data / "ml-100k"])
    assert movielens.schema.format == "movielens"
    assert (movielens.schema.label, movielens.schema.label_threshold) == ("rating", 4.0)
    assert movielens.schema.time == "timestamp"
    lists = [c.name for c in movielens.schema.categorical if c.is_list]
    assert lists == ["movie_title", "class"]
    criteo = infer_schema([shared_data / "criteo_kaggle" / "train_head_10000.tsv"])
    assert criteo.schema.format == "criteo"
    for found, source in ((movielens, shared_data / "ml-100k"), (criteo, shared_data / "criteo_kaggle")):
        config = tmp_path / f"{found.schema.format}.toml"
        write_config(found, [source], config)
        assert load_config(config).schema == found.schema
        assert run_prepare([str(config), str(tmp_path / found.schema.format)]) == 0
    with pytest.raises(ValueError, match="this looks like the test file, which has no labels"):
        infer_schema([shared_data / "criteo_kaggle" / "test_head_10000_unlabelled.tsv"])


def test_an_existing_configuration_is_kept(log: Path, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("mine")
    with pytest.raises(ValueError, match=r"--output: expected a new file, .*my\.toml exists"):
        run_init([str(log / "log.csv"), "--output", str(tmp_path / "my.toml")])
    assert (tmp_path / "my.toml").read_text() == "mine"


def test_odd_names_survive(tmp_path: Path) -> None:
    columns = {
        'say "hi"': ["a", "b"] * 10,
        "ключ = 1": ["x", "y", "z", "x"] * 5,
        "a.b": [0.5, 1.5] * 10,
        "y": [0, 1] * 10,
    }
    source = write_columns(tmp_path / "odd name.csv", **columns)
    found = infer_schema([source])
    write_config(found, [source], tmp_path / "my.toml")
    config = load_config(tmp_path / "my.toml")
    assert config.schema == found.schema
    assert [c.name for c in config.schema.categorical] == ['say "hi"', "ключ = 1"]
    assert config.sources[0].resolve() == source
    assert run_prepare([str(tmp_path / "my.toml"), str(tmp_path / "out")]) == 0


def test_empty_and_unknown_sources(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,user\n")
    with pytest.raises(ValueError, match=r"expected rows in .*, found none"):
        infer_schema([tmp_path / "a.csv"])
    (tmp_path / "a.bin").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="got one column; write the schema by hand"):
        infer_schema([tmp_path / "a.bin"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["only"], "expected SOURCE... OUT, got fewer than two paths"),
        (["a.csv", "out"], "expected a file, a folder or a pattern, found no files at a.csv"),
        (["--verify", "a", "b"], "--verify: expected one dataset, got 2 paths"),
        (["a.toml", "out"], "expected a configuration file at a.toml, found none"),
    ],
)
def test_prepare_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_prepare(arguments)


def test_prepare_alone_infers_the_schema_and_shows_it(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_prepare([str(log / "log.csv"), str(tmp_path / "out")]) == 0
    text, _, _ = capsys.readouterr().out.partition(str(tmp_path / "out"))
    (tmp_path / "shown.toml").write_text(text)
    assert load_config(tmp_path / "shown.toml").schema == infer_schema([log / "log.csv"]).schema
    assert Dataset(tmp_path / "out").rows("train") == 2400


def test_overlapping_times_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_columns(tmp_path / "a.csv", y=[0, 1] * 50, user=["a", "b"] * 50, t=list(range(100))[::-1])
    for by, said in (("order", True), ("time", False)):
        config = tmp_path / f"{by}.toml"
        config.write_text(
            f'[data]\nsource = "{source.name}"\nformat = "csv"\nlabel = "y"\ntime = "t"\nsplit = {{by = "{by}"}}\n'
            '[data.categorical]\nuser = "dictionary"\n'
        )
        assert run_prepare([str(config), str(tmp_path / by)]) == 0
        assert ("the times of these splits overlap" in capsys.readouterr().out) == said


def test_prepare_with_schema_and_recipe(log: Path, tmp_path: Path, shared_data: Path) -> None:
    config = tmp_path / "my.toml"
    run_init([str(log / "log.csv"), "--output", str(config)])
    assert run_prepare(["--schema", str(config), str(log / "log.csv"), str(tmp_path / "out")]) == 0
    sample = shared_data / "criteo_kaggle"
    assert run_prepare([str(sample), str(tmp_path / "criteo"), "--recipe", "criteo-kaggle-sample"]) == 0
    assert Dataset(tmp_path / "criteo").rows("train") == 8000


def test_words_of_names() -> None:
    assert find_words("user_ids") == {"user", "ids", "id"}
    assert find_words("clickCount30D") == {"click", "count", "d"}
    assert find_words("OSVersion") >= {"os", "version"}
    assert "count" not in find_words("account") | find_words("country")


def test_files_of_two_formats(log: Path, tmp_path: Path) -> None:
    shutil.copy(log / "log.csv", tmp_path / "c.csv")
    shutil.copy(log / "log.parquet", tmp_path / "c.parquet")
    message = r"expected files of one format, got csv \(.*c\.csv\) and parquet \(.*c\.parquet\); "
    with pytest.raises(ValueError, match=message):
        infer_schema([tmp_path / "c.csv", tmp_path / "c.parquet"])
    shutil.copy(log / "log.csv", tmp_path / "d.csv")
    assert infer_schema([tmp_path / "c.csv", tmp_path / "d.csv"]).schema.format == "csv"


def test_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,n,n\n" + "0,1,a\n1,2,b\n" * 10)
    pq.write_table(pa.Table.from_arrays([pa.array([0, 1])] * 3, names=["y", "n", "n"]), tmp_path / "a.parquet")
    for source in (tmp_path / "a.csv", tmp_path / "a.parquet"):
        with pytest.raises(ValueError, match=r"a\.\w+: expected one column 'n', found 2; rename one"):
            infer_schema([source])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a header and rows, found an empty file"),
        ("y,user\n0,a\n".encode("utf-16"), "expected text in UTF-8, got UTF-16; convert it to UTF-8"),
        ("y,user\n0,a\n".encode("utf-16-le"), "expected text in UTF-8, got zero bytes, .*; convert it to UTF-8"),
    ],
    ids=["empty", "UTF-16", "UTF-16 without a mark"],
)
def test_files_that_are_no_text(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.csv: {message}"):
        infer_schema([tmp_path / "a.csv"])


def test_a_configuration_that_cannot_be_written(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full.toml").symlink_to("/dev/full")
    monkeypatch.setattr(Path, "exists", lambda _: False)
    with pytest.raises(ValueError, match=r"--output: .*full\.toml cannot be written \(No space left on device\)"):
        write_config(infer_schema([log / "log.csv"]), [log / "log.csv"], tmp_path / "full.toml")


def test_lists_of_which_nothing_can_be_learned_are_left_out(tmp_path: Path) -> None:
    columns = {
        "y": [0, 1] * 50,
        "user": ["a", "b"] * 50,
        "embedding": [[0.5, i / 7, -1.0] for i in range(100)],
        "words": [[f"w{2 * i}", f"w{2 * i + 1}"] for i in range(100)],
        "tags": [[f"t{i % 3}", f"w{i}"] for i in range(100)],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = infer_schema([tmp_path / "a.parquet"])
    assert [column.name for column in found.schema.categorical] == ["user", "tags"]
    assert found.dropped == {
        "embedding": "it holds lists of decimal numbers, which are neither ids nor one number",
        "words": "no value comes twice in its lists",
    }

"""What is said of files reaches their preparation, or is refused where there is none to reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contrastive.data import synthetic_sequences
from contrastive.data.prepare_sequences import prepare_sequences
from contrastive.data.provide_sequences import provide_sequences
from contrastive.data.sequence_schema import ItemColumns, SequenceSchema, SequenceSplit

BY_TIME = SequenceSplit(by="time", valid=0.2, test=0.2)
SCHEMA = SequenceSchema(user="who", time="when", split=BY_TIME)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences divided by time, whose files name their columns."""
    folder = tmp_path_factory.mktemp("provide")
    rows = [f"u{user},{(user + time) % 7},{time}" for user in range(20) for time in range(8)]
    (folder / "log.csv").write_text("\n".join(["who,item,when", *rows]) + "\n", encoding="utf-8")
    return prepare_sequences(SCHEMA, [folder / "log.csv"], folder / "data").folder


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            SequenceSchema(min_actions=9),
            r"^--schema\.min-actions: expected 3, as .*data was prepared with, got 9; leave",
        ),
        (SequenceSchema(user="person"), r"^--schema\.user: expected who, as .*, got person"),
        (SequenceSchema(split=SequenceSplit(by="time", held_out="all")), r"^--schema\.split\.held-out: expected next"),
        (SequenceSchema(format="parquet"), r"^--schema\.format: expected csv"),
        (
            SequenceSchema(items=ItemColumns(files=("a.csv",), columns=("b",))),
            r"^--schema\.items\.columns: expected \[\]",
        ),
    ],
)
def test_prepared_sequences_are_not_taken_for_others(prepared: Path, schema: SequenceSchema, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        provide_sequences(schema, prepared)


@pytest.mark.parametrize("schema", [SCHEMA, SequenceSchema(split=BY_TIME), SequenceSchema(format="csv")])
def test_prepared_sequences_are_what_they_are_asked_for(
    prepared: Path, capsys: pytest.CaptureFixture[str], schema: SequenceSchema
) -> None:
    assert provide_sequences(schema, prepared).folder == prepared
    assert ("data was prepared with " in capsys.readouterr().err) == (schema != SCHEMA)


def test_what_nobody_asked_for_is_told(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provide_sequences(SequenceSchema(time="when"), prepared)
    told = "--schema.split.by time, --schema.split.test 0.2, --schema.split.valid 0.2, --schema.user who"
    assert capsys.readouterr().err == f"recforge: {prepared} was prepared with {told}\n"


def test_sequences_of_our_own_making_are_divided_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = synthetic_sequences.SyntheticSequencesConfig(num_users=60, num_items=50, num_tastes=4, most_actions=20)
    monkeypatch.setattr(synthetic_sequences, "SyntheticSequencesConfig", lambda: few)
    monkeypatch.chdir(tmp_path)
    usual = provide_sequences(SequenceSchema(), None, is_synthetic=True)
    asked = provide_sequences(SequenceSchema(min_actions=5, split=BY_TIME), None, is_synthetic=True)
    assert asked.folder != usual.folder
    assert (asked.info.users_left_out, usual.info.users_left_out) == (int((usual.lengths < 5).sum()), 0)
    assert asked.info.users_left_out > 0
    assert "valid_from" in asked.info.origin
    with pytest.raises(ValueError, match=r"^--schema\.user: expected --data beside it, as who does nothing"):
        provide_sequences(SequenceSchema(user="who"), None, is_synthetic=True)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"split": SequenceSplit(valid_from=1.0, test_from=2.0)}, "split.valid-from"),
        ({"split": SequenceSplit(test=0.2)}, "split.test"),
        ({"split": SequenceSplit(held_out="all")}, "split.held-out"),
        ({"time": "t", "split": SequenceSplit(by="time", valid_from=1, test_from=2, valid=0.3)}, "split.valid"),
        ({"label_threshold": 3.0}, "label-threshold"),
        ({"num_items": 9}, "num-items"),
        ({"format": "lines", "time": "t"}, "time"),
        ({"format": "lines", "user": "who"}, "user"),
        ({"items": ItemColumns(min_count=3)}, "items.min-count"),
        ({"items": ItemColumns(files=("a.csv",), columns=("b",), separator=";")}, "items.separator"),
    ],
)
def test_what_no_preparation_makes_use_of_is_refused(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=rf"^--schema\.{flag}: expected .* beside it, as .* does nothing otherwise"):
        SequenceSchema(**{"format": "csv", **settings}).check_used()
    SequenceSchema().check_used()


def test_a_preparation_refuses_it(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("a 1 2 3 4\n")
    with pytest.raises(ValueError, match=r"^--schema\.split\.valid-from: expected --schema\.split\.by time beside it"):
        prepare_sequences(
            SequenceSchema(split=SequenceSplit(valid_from=1.0, test_from=2.0)),
            [tmp_path / "log.txt"],
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()

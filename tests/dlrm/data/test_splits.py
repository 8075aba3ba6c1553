"""Cuts by time never split rows of one time, and rows come out in the order of time, from any order of the source."""

from __future__ import annotations

import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.data.dataset import Dataset
from dlrm.data.prepare import prepare
from dlrm.data.schema import CategoricalColumn, DataSchema, SplitConfig
from dlrm.data.splits import SPLITS, ChunkTimes, cut_by_order, cut_by_time


def chunked(chunks: list[list[float]], dtype: str) -> ChunkTimes:
    chunks = [sorted(chunk) for chunk in chunks]
    flat = np.array([time for chunk in chunks for time in chunk], dtype=dtype)
    return ChunkTimes(flat, np.cumsum([0] + [len(chunk) for chunk in chunks]))


whole = st.lists(
    st.lists(st.integers(-(2**62), 2**62) | st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=6
)
real = st.lists(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0) | st.sampled_from([-1.5, 0.0, 2.0]),
        min_size=1,
        max_size=9,
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(st.one_of(whole.map(lambda chunks: (chunks, "int64")), real.map(lambda chunks: (chunks, "float64"))), st.data())
def test_order_of_the_whole(drawn: tuple[list[list[float]], str], data: st.DataObject) -> None:
    chunks, dtype = [sorted(chunk) for chunk in drawn[0]], drawn[1]
    times = chunked(chunks, dtype)
    order = sorted((time, chunk, row) for chunk, rows in enumerate(chunks) for row, time in enumerate(rows))
    assert times.times_at(np.arange(times.rows)).tolist() == [time for time, _, _ in order]
    cuts = sorted(data.draw(st.sets(st.integers(1, times.rows))) | {0, times.rows})
    for (start, stop), pieces in zip(pairwise(cuts), times.pieces(np.array(cuts)), strict=True):
        found = [(chunks[chunk][row], chunk, row) for chunk, first, end in pieces for row in range(first, end)]
        assert sorted(found) == order[start:stop]
    assert times.is_sorted == (order == sorted(order, key=lambda place: place[1:]))


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=20), min_size=1, max_size=5))
def test_rows_of_one_time_stay_together(chunks: list[list[int]]) -> None:
    times = chunked(chunks, "int64")
    ordered = sorted(time for chunk in chunks for time in chunk)
    try:
        cuts = cut_by_time(times, SplitConfig(by="time", valid=0.25, test=0.25))
    except ValueError as error:
        assert "split" in str(error)  # noqa: PT017 - refusing is right where there are too few times
        assert len(set(ordered)) < 3
        return
    assert ordered[cuts.train - 1] < ordered[cuts.train]
    assert ordered[cuts.valid - 1] < ordered[cuts.valid]
    distinct_cuts = [place for place in range(1, len(ordered)) if ordered[place - 1] < ordered[place]]
    ideal = len(ordered) - round(len(ordered) * 0.25)
    # The first is the earliest that train can end at.
    assert abs(cuts.valid - ideal) == min(abs(place - ideal) for place in distinct_cuts[1:])


def test_a_day_is_not_split() -> None:
    days = np.repeat(np.arange(7), 100)  # .8 and .9 would lie within days 5 and 6
    times = ChunkTimes(days, np.array([0, 350, 700]))
    cuts = cut_by_time(times, SplitConfig(by="time", valid=0.1, test=0.1))
    assert (cuts.train, cuts.valid) == (500, 600)


def test_cut_by_order() -> None:
    cuts = cut_by_order(10_000, SplitConfig(valid=0.0, test=0.2))
    assert (cuts.train, cuts.valid, cuts.rows) == (8000, 8000, 10_000)
    cuts = cut_by_order(45_840_617, SplitConfig(valid=0.5 / 7, test=0.5 / 7))
    assert cuts.rows - cuts.valid == cuts.valid - cuts.train == 3_274_330
    with pytest.raises(ValueError, match="expected rows in every part, got train 4, valid 0, test 0 of 4"):
        cut_by_order(4, SplitConfig(valid=0.1, test=0.1))


def prepare_events(folder: Path, events: list[tuple[str, int]], by: str = "time", **shares: float) -> Dataset:
    source = folder / "events.csv"
    source.write_text(
        "when,click,id\n" + "".join(f"{when},{place % 2},{name}\n" for place, (when, name) in enumerate(events))
    )
    schema = DataSchema(
        format="csv",
        label="click",
        time="when",
        categorical=(CategoricalColumn(name="id", min_count=1),),
        split=SplitConfig(by=by, **shares),
    )
    return prepare(schema, [source], folder / "out", processes=1, block_bytes=600)


def read_times(dataset: Dataset) -> dict[str, list[float]]:
    return {
        split: [
            time
            for index in range(len(dataset.info.splits.get(split, ())))
            for time in dataset.part(split, index).extra["time"].tolist()
        ]
        for split in SPLITS
    }


def test_unsorted_source_becomes_chronological(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    times = draw.integers(0, 300, 1000)
    dataset = prepare_events(tmp_path, [(str(time), place) for place, time in enumerate(times)], valid=0.2, test=0.2)
    found = read_times(dataset)
    assert found["train"] + found["valid"] + found["test"] == sorted(times.tolist())
    assert max(found["train"]) < min(found["valid"]) <= max(found["valid"]) < min(found["test"])
    assert abs(dataset.rows("test") - 200) < 10
    assert len(dataset.info.splits["train"]) > 5
    assert dataset.info.time_ranges["test"] == (min(found["test"]), max(found["test"]))
    # equal times keep the order of the source, so labels and ids are still those of their rows
    order = np.argsort(times, kind="stable")
    labels = [
        label
        for split in SPLITS
        for i in range(len(dataset.info.splits[split]))
        for label in dataset.part(split, i).label
    ]
    assert labels == (order % 2).tolist()


@pytest.mark.parametrize(
    ("form", "first"),
    [
        ("{:%Y-%m-%d %H:%M:%S}", 1_700_000_000.0),
        ("{:%Y-%m-%dT%H:%M:%SZ}", 1_700_000_000.0),
        ("{:%Y-%m-%dT%H:%M:%S.250000}", 1_700_000_000.25),
        ("{:%Y-%m-%d}", 1_699_920_000.0),
    ],
)
def test_timestamps_become_seconds(tmp_path: Path, form: str, first: float) -> None:
    start = datetime.datetime(2023, 11, 14, 22, 13, 20)
    events = [(form.format(start + datetime.timedelta(hours=7 * place)), place) for place in range(50)]
    dataset = prepare_events(tmp_path, events[::-1])
    assert read_times(dataset)["train"][0] == first
    assert dataset.info.time_ranges["train"][0] == first


def test_whole_numbers_keep_every_digit(tmp_path: Path) -> None:
    """Nanoseconds do not fit a float: two of them that a float cannot tell apart are still two times."""
    base = 1_700_000_000_000_000_000
    dataset = prepare_events(tmp_path, [(str(base + place), place) for place in range(40)], valid=0.1, test=0.1)
    found = read_times(dataset)
    assert found["train"] + found["valid"] + found["test"] == [base + place for place in range(40)]
    assert dataset.rows("test") == 4


def test_whole_and_real_times_may_mix(tmp_path: Path) -> None:
    events = [(f"{place}" if place < 60 else f"{place}.5", place) for place in range(120)]
    found = read_times(prepare_events(tmp_path, events[::-1]))
    assert found["train"] + found["valid"] + found["test"] == [float(when) for when, _ in events]


def test_too_few_times(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split: expected rows in every part.*rows of one time stay together"):
        prepare_events(tmp_path, [("5", place) for place in range(40)])

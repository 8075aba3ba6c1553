"""Splits hold exactly the samples that a plain loop over users finds, and a test never comes before its training."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.config import SequenceRunConfig
from contrastive.data.sequence_schema import SequenceSchema, SequenceSplit
from contrastive.data.sequence_splits import SequenceCuts, cut_sequences
from contrastive.data.sequences import SequenceData
from dlrm.cli import parse
from dlrm.data.splits import SPLITS, TEST, TRAIN, VALID


def make_data(sequences: list[list[int]]) -> SequenceData:
    """Each user's list holds the times of the actions; the items do not matter."""
    times = np.array([time for user in sequences for time in sorted(user)])
    return SequenceData(
        users=pa.array([f"u{user}" for user in range(len(sequences))], pa.large_string()),
        items=pa.array(["only"], pa.large_string()),
        offsets=np.cumsum([0] + [len(user) for user in sequences]),
        actions=np.ones(len(times), dtype=np.int64),
        times=times,
    )


def targets(cuts: SequenceCuts, split: str) -> list[list[int]]:
    """The places of each user's targets among the user's actions."""
    return [list(range(first, first + count)) for first, count in zip(*cuts.targets[split], strict=True)]


def test_leave_one_out_as_published() -> None:
    lengths = [1, 2, 3, 4, 7]
    cuts = cut_sequences(make_data([list(range(length)) for length in lengths]), SequenceSchema())
    assert targets(cuts, TRAIN) == [[], [], [], [1], [1, 2, 3, 4]]
    assert targets(cuts, VALID) == [[], [], [1], [2], [5]]
    assert targets(cuts, TEST) == [[], [], [2], [3], [6]]
    assert cuts.train_actions.tolist() == [0, 0, 1, 2, 5]


def test_first_actions_can_be_learned() -> None:
    data = make_data([list(range(length)) for length in (2, 3, 5)])
    cuts = cut_sequences(data, SequenceSchema(first_actions=True))
    assert [targets(cuts, split) for split in SPLITS] == [[[], [0], [0, 1, 2]], [[], [1], [3]], [[], [2], [4]]]
    by_time = SequenceSchema(first_actions=True, split=SequenceSplit(by="time", valid_from=2, test_from=3))
    assert targets(cut_sequences(data, by_time), TRAIN) == [[], [0, 1], [0, 1]]


def test_users_with_few_actions_can_be_left_out() -> None:
    data = make_data([[1] * 4, [1] * 5])
    cuts = cut_sequences(data, SequenceSchema(min_actions=5))
    assert [targets(cuts, split) for split in SPLITS] == [[[], [1, 2]], [[], [3]], [[], [4]]]


@given(
    sequences=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=12),
    held_out=st.sampled_from(["next", "all"]),
    cuts_at=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
@settings(max_examples=80, deadline=None)
def test_cuts_in_time(sequences: list[list[int]], held_out: str, cuts_at: tuple[int, int]) -> None:
    valid_from, test_from = sorted(cuts_at)
    split = SequenceSplit(by="time", valid_from=valid_from, test_from=test_from, held_out=held_out)
    expected: dict[str, list[list[int]]] = {name: [] for name in SPLITS}
    for user in map(sorted, sequences):
        parts: dict[str, list[int]] = {name: [] for name in SPLITS}
        for place, time in enumerate(user):
            if place and len(user) >= 3:
                parts[TRAIN if time < valid_from else VALID if time < test_from else TEST].append(place)
        for name in SPLITS:
            expected[name].append(parts[name][: 1 if held_out == "next" and name != TRAIN else None])
    schema = SequenceSchema(split=split)
    if not all(any(expected[name]) for name in SPLITS):
        with pytest.raises(
            ValueError, match=r"--schema\.split: expected samples in every part, got train \d+, valid \d+, test \d+"
        ):
            cut_sequences(make_data(sequences), schema)
        return
    cuts = cut_sequences(make_data(sequences), schema)
    assert {name: targets(cuts, name) for name in SPLITS} == expected
    trained = [sum(time < valid_from for time in user) if len(user) >= 3 else 0 for user in sequences]
    assert cuts.train_actions.tolist() == trained


def test_shares_of_time_keep_actions_of_one_time_together() -> None:
    rng = np.random.default_rng(0)
    data = make_data([rng.integers(0, 40, 12).tolist() for _ in range(100)])
    cuts = cut_sequences(data, SequenceSchema(split=SequenceSplit(by="time", valid=0.2, test=0.1, held_out="all")))
    assert cuts.times is not None
    valid_from, test_from = cuts.times
    assert data.times is not None
    assert abs((data.times >= test_from).mean() - 0.1) < 0.03
    assert abs((data.times >= valid_from).mean() - 0.3) < 0.03
    for split, (low, high) in {TRAIN: (-1, valid_from), VALID: (valid_from, test_from), TEST: (test_from, 99)}.items():
        for user, places in enumerate(targets(cuts, split)):
            assert all(low <= data.times[data.offsets[user] + place] < high for place in places)


def test_a_share_of_none_needs_no_samples() -> None:
    data = make_data([list(range(10))] * 3)
    cuts = cut_sequences(data, SequenceSchema(split=SequenceSplit(by="time", valid=0.0, test=0.2)))
    assert targets(cuts, VALID) == [[], [], []]
    assert targets(cuts, TEST) == [[8], [8], [8]]
    cuts = cut_sequences(data, SequenceSchema(split=SequenceSplit(by="time", valid=0.2, test=0.0)))
    assert targets(cuts, TEST) == [[], [], []]
    assert targets(cuts, VALID) == [[8], [8], [8]]


def test_what_cannot_be_split() -> None:
    data = make_data([[1, 2], [3, 4, 5]])
    with pytest.raises(
        ValueError, match=r"got train 0, valid 1, test 1 from 2 users, 1 of whom have 3 actions or more"
    ):
        cut_sequences(data, SequenceSchema())
    with pytest.raises(ValueError, match=r"users of 9 actions and more train; lower --schema\.min-actions"):
        cut_sequences(data, SequenceSchema(min_actions=9))
    without = SequenceData(users=data.users, items=data.items, offsets=data.offsets, actions=data.actions)
    with pytest.raises(ValueError, match=r"--schema\.split\.by time: expected times of the actions, got none"):
        cut_sequences(without, SequenceSchema(split=SequenceSplit(by="time")))


def test_points_in_time_are_numbers_or_dates() -> None:
    flags = ["--schema.split.by", "time", "--schema.split.valid-from", "1970-01-02", "--schema.split.test-from"]
    for last in ("1970-01-03 00:00:01", "172801", "172801.0"):
        split = parse(SequenceRunConfig, [*flags, last], program="recforge").schema.split
        assert (split.valid_from, split.test_from) == (86_400.0, 172_801.0)
    for bad in ("soon", "nan", "inf", "2024-13-01"):
        with pytest.raises(ValueError, match=f"or a date like 2024-05-31 23:59:59, got '{bad}'.*split.test-from"):
            parse(SequenceRunConfig, [*flags, bad], program="recforge")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid_from": 3.0}, "expected both valid_from and test_from, or neither"),
        ({"valid_from": 3.0, "test_from": 2.0}, "expected valid_from <= test_from, got 3.0 and 2.0"),
        ({"valid": 0.6, "test": 0.4}, r"valid \+ test < 1, got 0.6 and 0.4"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceSplit(by="time", **settings)

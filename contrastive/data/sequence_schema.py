"""What a user says of sequences: where user, item and time stand, what is known of items, and how to split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dlrm.data.schema import CategoricalColumn, SourceFormat

SequenceFormat = Literal["lines", "csv", "tsv", "parquet", "movielens"]
LEAST_ACTIONS = 3


@dataclass(frozen=True, kw_only=True)
class SequenceSplit:
    """What is learned and what is held out.

    Attributes:
        by: `leave-one-out` tests on the last action of each user and validates on the one before it; `time` trains on
            what happened before a point in time, validates from there, and tests from a second point on.
        valid_from: with `time`: the first time that validates; without it, the share `valid` decides.
        test_from: with `time`: the first time that tests; without it, the share `test` decides.
        valid: with `time`: share of all actions, before those that test.
        test: with `time`: share of all actions, the latest.
        held_out: with `time`: whether each user is asked for the `next` action after the cut, or for `all` of them.
    """

    by: Literal["leave-one-out", "time"] = "leave-one-out"
    valid_from: float | None = None
    test_from: float | None = None
    valid: float = 0.1
    test: float = 0.1
    held_out: Literal["next", "all"] = "next"

    def __post_init__(self) -> None:
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError("split: expected both valid_from and test_from, or neither, got one; give the other, too")
        if self.valid_from is not None and self.test_from is not None and self.valid_from > self.test_from:
            raise ValueError(
                f"split: expected valid_from <= test_from, got {self.valid_from} and {self.test_from}; swap them"
            )
        if min(self.valid, self.test) < 0 or self.valid + self.test >= 1:
            raise ValueError(
                f"split: expected valid >= 0, test >= 0 and valid + test < 1, got {self.valid} and {self.test}"
            )


@dataclass(frozen=True, kw_only=True)
class ItemColumns:
    """A file of items, one row each, whose columns become features beside the item's own row.

    Attributes:
        features: its columns; rows 0 and 1 of their tables are for values out of vocabulary and absent ones.
        item: the column of the item's name.
        format: how the file is written; None goes by its ending.
    """

    features: tuple[CategoricalColumn, ...]
    item: str = "item"
    format: SourceFormat | None = None

    def __post_init__(self) -> None:
        names = [column.name for column in self.features]
        if not names:
            raise ValueError("items: expected at least one column of features, got none")
        if len(set(names)) < len(names) or {"item", self.item, "train_count"} & set(names):
            raise ValueError(
                f"items: expected each column once, and none of 'item', 'train_count' and '{self.item}' among the "
                f"features, got {', '.join(names)}; rename one"
            )


@dataclass(frozen=True, kw_only=True)
class SequenceSchema:
    """Everything the preparation needs to know of a source of sequences.

    Attributes:
        format: `lines` has a line per user, 'user item item ...', items numbered from 1, the oldest first; the others
            have a row per action. None goes by the files' ending.
        user: column of the user.
        item: column of the item.
        time: column that orders actions; None takes the order of the rows.
        label: column of which an action is kept where it is 1, or not below `label_threshold`; None keeps all.
        label_threshold: of the label.
        min_actions: users with fewer are neither learned nor tested; they keep their place, and can be recommended to.
        num_items: of the catalogue, with `lines`; None takes the largest number that occurs.
        items: what the file of items holds, if there is one.
        split: what is held out.
    """

    format: SequenceFormat | None = None
    user: str = "user"
    item: str = "item"
    time: str | None = None
    label: str | None = None
    label_threshold: float | None = None
    min_actions: int = LEAST_ACTIONS
    num_items: int | None = None
    items: ItemColumns | None = None
    split: SequenceSplit = SequenceSplit()

    def __post_init__(self) -> None:
        if self.min_actions < LEAST_ACTIONS:
            raise ValueError(
                f"min_actions: expected at least {LEAST_ACTIONS} (one each to learn, to validate and to test), got "
                f"{self.min_actions}"
            )
        if self.num_items is not None and self.num_items < 1:
            raise ValueError(f"num_items: expected at least 1, got {self.num_items}")
        names = [name for name in (self.user, self.item, self.time, self.label) if name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"schema: expected different columns as user, item, time, label, got {', '.join(names)}")

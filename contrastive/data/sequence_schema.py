"""What a user says of sequences: where user, item and time stand, what is known of items, and how to split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from contrastive.unused_settings import Need, refuse_unused
from dlrm.data.schema import CategoricalColumn

SequenceFormat = Literal["lines", "csv", "tsv", "parquet", "movielens"]
LEAST_ACTIONS = 3


def parse_time(text: str) -> float | None:
    """Read a point in time as files of actions have them: a number, or a timestamp, seconds since 1970 (UTC).

    Raises:
        ValueError: it is neither, nor "None".
    """
    import pyarrow as pa  # here, as who gives no time needs none of it

    from dlrm.data.cells import BadCell, to_times

    if text == "None":
        return None
    try:
        time = float(to_times(pa.array([text]), "time")[0])
    except BadCell:
        time = math.nan
    if not math.isfinite(time):
        raise ValueError(f"expected a number, or a date like 2024-05-31 23:59:59, got '{text}'")
    return time


# What the command line takes for a point in time.
_AS_TIME = PrimitiveConstructorSpec[float | None](
    nargs=1,
    metavar="{None}|NUMBER|DATE",
    instance_from_str=lambda words: parse_time(words[0]),
    is_instance=lambda value: value is None or isinstance(value, int | float),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True, kw_only=True)
class SequenceSplit:
    """What is learned and what is held out.

    Attributes:
        by: `leave-one-out` tests on the last action of each user and validates on the one before it; `time` trains on
            what happened before a point in time, validates from there, and tests from a second point on.
        valid_from: with `time`: the first time that validates, seconds since 1970 where times are dates (a flag takes
            2024-05-31 or "2024-05-31 23:59:59" for it, UTC); without it, the share `valid` decides.
        test_from: with `time`: the first time that tests, alike; without it, the share `test` decides.
        valid: with `time`: share of all actions, before those that test.
        test: with `time`: share of all actions, the latest.
        held_out: with `time`: whether each user is asked for the `next` action after the cut, or for `all` of them.
    """

    by: Literal["leave-one-out", "time"] = "leave-one-out"
    valid_from: Annotated[float | None, _AS_TIME] = None
    test_from: Annotated[float | None, _AS_TIME] = None
    valid: float = 0.1
    test: float = 0.1
    held_out: Literal["next", "all"] = "next"

    def __post_init__(self) -> None:
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError(
                "--schema.split: expected both valid_from and test_from, or neither, got one; give the other, too"
            )
        if self.valid_from is not None and self.test_from is not None and self.valid_from > self.test_from:
            raise ValueError(
                f"--schema.split: expected valid_from <= test_from, got {self.valid_from} and {self.test_from}"
            )
        if min(self.valid, self.test) < 0 or self.valid + self.test >= 1:
            raise ValueError(
                f"--schema.split: expected valid >= 0, test >= 0 and valid + test < 1, got {self.valid} and {self.test}"
            )


@dataclass(frozen=True, kw_only=True)
class ItemColumns:
    """Files of items, a row each, whose columns become features beside the item's own row.

    Attributes:
        files: files, folders or globs; none, and there are no features.
        item: column of the item's name.
        columns: features with one value per item; rows 0 and 1 of their tables are for rare and for absent values.
        lists: features with any number of values per item: list columns, or text split at `separator`.
        separator: between the values of a text.
        min_count: values of fewer items share row 0.
        format: how the files are written; None goes by their ending.
    """

    files: tuple[str, ...] = ()
    item: str = "item"
    columns: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    separator: str = "|"
    min_count: int = 2
    format: Literal["csv", "tsv", "parquet"] | None = None

    def __post_init__(self) -> None:
        names = (*self.columns, *self.lists)
        if bool(self.files) != bool(names):
            got = "files alone" if self.files else f"{', '.join(names)} alone"
            raise ValueError(f"--schema.items: expected files, and columns or lists of them, got {got}; name both")
        if len(set(names)) < len(names) or {"item", "train_count", self.item} & set(names):
            raise ValueError(
                f"--schema.items.columns: expected each once, and none of 'item', 'train_count' and '{self.item}', "
                f"got {', '.join(names)}; rename one"
            )
        if not self.separator:
            raise ValueError("--schema.items.separator: expected some text, got nothing")

    @property
    def features(self) -> tuple[CategoricalColumn, ...]:
        """The columns as features."""
        single = (CategoricalColumn(name=name, min_count=self.min_count) for name in self.columns)
        listed = (
            CategoricalColumn(name=name, min_count=self.min_count, is_list=True, separator=self.separator)
            for name in self.lists
        )
        return (*single, *listed)


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
        items: what else is known of items.
        first_actions: train on each user's first action too, which nothing came before, as BSARec's authors do.
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
    items: ItemColumns = ItemColumns()
    first_actions: bool = False
    split: SequenceSplit = SequenceSplit()

    def __post_init__(self) -> None:
        if self.min_actions < LEAST_ACTIONS:
            raise ValueError(
                f"--schema.min-actions: expected at least {LEAST_ACTIONS}, one each to learn, to validate and to "
                f"test, got {self.min_actions}"
            )
        if self.num_items is not None and self.num_items < 1:
            raise ValueError(f"--schema.num-items: expected at least 1, got {self.num_items}")
        names = [name for name in (self.user, self.item, self.time, self.label) if name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"--schema: expected different columns as user, item, time, label, got {', '.join(names)}")

    def check_used(self) -> None:
        """Check that nothing was said which the preparation makes no use of; `format` is known by then.

        Raises:
            ValueError: naming the flag, and what would make use of it.
        """
        split, is_lines = self.split, self.format == "lines"
        by_time = ("split.valid_from", "split.test_from", "split.valid", "split.test", "split.held_out")
        of_items = ("items.item", "items.separator", "items.min_count", "items.format")
        needs = [
            Need("--schema.split.by time", split.by == "time", by_time),
            Need("no --schema.split.valid-from", split.valid_from is None, ("split.valid", "split.test")),
            Need("--schema.label", self.label is not None, ("label_threshold",)),
            Need("files of a line per user (--schema.format lines)", is_lines, ("num_items",)),
            Need(
                "files of a row per action (not --schema.format lines)", not is_lines, ("user", "item", "time", "label")
            ),
            Need("--schema.items.files", bool(self.items.files), of_items),
            Need("--schema.items.lists", bool(self.items.lists), ("items.separator",)),
        ]
        refuse_unused(self, SequenceSchema(), needs, "schema.")

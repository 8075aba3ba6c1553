"""What makes a prepared dataset less useful than it looks, in one line each: `prepare` prints and keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlrm.data.schema import DataSchema


def find_warnings(
    schema: DataSchema, labels: Mapping[str, tuple[int, int]], vocabulary: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return what a user should hear of a dataset that can be trained.

    Args:
        schema: of the data.
        labels: (clicks, rows) of each split.
        vocabulary: of each feature, how many values there are and how many got a row.
    """
    one_class = [
        f"{split}: column '{schema.label}' is {int(clicks > 0)} in all {rows:,} rows, so AUC is not defined there; "
        f"check `label`, or change the share `{split}` in `split`"
        for split, (clicks, rows) in labels.items()
        if clicks in (0, rows)
    ]
    empty = [
        f"column '{column.name}': none of its {facts['distinct']:,} values is there {column.min_count} times in the "
        "training part, so that it says nothing; lower its min_count, or remove it"
        for column, facts in zip(schema.categorical, vocabulary, strict=True)
        if facts.get("kept") == 0
    ]
    return one_class + empty

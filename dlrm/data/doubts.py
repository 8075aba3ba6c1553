"""What makes a prepared dataset less useful than it looks, in one line each: `prepare` prints and keeps them."""

from __future__ import annotations

from collections.abc import Mapping

from dlrm.data.schema import DataSchema


def find_warnings(schema: DataSchema, labels: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return what a user should hear of a dataset that can be trained.

    Args:
        schema: of the data.
        labels: (clicks, rows) of each split.
    """
    return [
        f"{split}: column '{schema.label}' is {int(clicks > 0)} in all {rows:,} rows, so AUC is not defined there; "
        f"check `label`, or change the share `{split}` in `split`"
        for split, (clicks, rows) in labels.items()
        if clicks in (0, rows)
    ]

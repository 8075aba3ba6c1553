"""The Criteo click logs: tab-separated, without a header; label, 13 counts, 26 ids of 8 hexadecimal digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlrm.data.source import TextForm, find_files, read_header

LABEL = "label"
NUMERIC = tuple(f"I{number}" for number in range(1, 14))
CATEGORICAL = tuple(f"C{number}" for number in range(1, 27))
COLUMNS = (LABEL, *NUMERIC, *CATEGORICAL)
PATTERNS = ("train*", "day_*", "*.tsv*", "*.txt*")


def find_criteo(sources: Sequence[Path]) -> list[tuple[Path, TextForm]]:
    """Return the log's files; of a folder, `train*` or `day_*` in natural order.

    Raises:
        ValueError: a file is not of this form, or is the test file, which has no labels.
    """
    form = TextForm(columns=COLUMNS, delimiter="\t", quoted=False, has_header=False)
    files = find_files(sources, PATTERNS)
    for file in files:
        cells = read_header(file, "\t", quoted=False)
        if len(cells) == len(COLUMNS) - 1:
            raise ValueError(
                f"{file}: expected {len(COLUMNS)} columns (label, I1 ... I13, C1 ... C26), got {len(cells)}: this "
                "looks like the test file, which has no labels; take train.txt or day_0 ... day_23"
            )
        if cells and len(cells) != len(COLUMNS):
            raise ValueError(
                f"{file}: expected {len(COLUMNS)} tab-separated columns (label, I1 ... I13, C1 ... C26), "
                f"got {len(cells)}; set the schema's format to csv, tsv or parquet for files of another form"
            )
    return [(file, form) for file in files]

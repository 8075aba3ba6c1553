"""Gives ids of a prepared dataset the values back that they stand for, for whoever reads a report."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from dlrm.data.dataset import Dataset
from dlrm.data.schema import FIRST_ID_ROW, MISSING_ROW, OUT_OF_VOCABULARY_ROW
from dlrm.data.vocabulary import vocabulary_file


def name_values(dataset: Dataset, feature: str, ids: Iterable[int]) -> list[str]:
    """Return the value behind each id of a feature, or the id itself where the dataset keeps no dictionary."""
    path = vocabulary_file(dataset.folder, feature)
    if not path.is_file():
        return [str(row) for row in ids]
    with pa.memory_map(str(path)) as file:
        values = pa.ipc.open_file(file).read_all().column("value")
        names = {OUT_OF_VOCABULARY_ROW: "(rare or unseen)", MISSING_ROW: "(missing)"}
        return [names.get(row) or str(values[row - FIRST_ID_ROW].as_py()) for row in ids]

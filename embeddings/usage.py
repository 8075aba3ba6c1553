"""What a batch asks of a table: how many ids and bags, how many distinct rows, and where in the table they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.tables import TableConfig


@dataclass(frozen=True, kw_only=True)
class TableUsage:
    """What samples ask of one table, over all of its features.

    Attributes:
        ids_per_sample: mean number of ids.
        bags_per_sample: mean number of bags that are not empty.
        distinct: (ids, distinct rows among so many ids), ascending; empty means that ids are drawn evenly.
        traffic: share of the ids that lie below row ``num_rows * i / (len(traffic) - 1)``, from 0 to 1; empty means
            even. Prepared data numbers rows by frequency, so that most ids lie in the first few.
    """

    ids_per_sample: float
    bags_per_sample: float
    distinct: tuple[tuple[float, float], ...] = ()
    traffic: tuple[float, ...] = ()

    def distinct_rows(self, ids: float, num_rows: int) -> float:
        """Return the expected number of distinct rows among ``ids`` ids of a table of ``num_rows``."""
        if ids <= 1:
            return ids
        if not self.distinct:
            return -num_rows * float(np.expm1(ids * np.log1p(-1 / num_rows))) if num_rows > 1 else 1.0
        x, y = np.log(np.array([(1.0, 1.0), *self.distinct])).T
        at = float(np.log(ids))
        if at > x[-1]:  # goes on as the last two points do
            slope = float((y[-1] - y[-2]) / (x[-1] - x[-2])) if x[-1] > x[-2] else 0.0
            found = float(np.exp(y[-1] + slope * (at - x[-1])))
        else:
            found = float(np.exp(np.interp(at, x, y)))
        return min(found, ids, float(num_rows))

    def share_of_rows(self, first_row: NDArray[Any], count: NDArray[Any], num_rows: int) -> NDArray[np.float64]:
        """Return the shares of the ids that lie in rows [first_row, first_row + count)."""
        if not self.traffic:
            return np.asarray(count / num_rows)
        scale, places = (len(self.traffic) - 1) / num_rows, np.arange(len(self.traffic))
        low, high = (np.interp(edge * scale, places, self.traffic) for edge in (first_row, first_row + count))
        return np.asarray(high - low)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a global batch asks of all tables.

    Attributes:
        global_batch_size: samples of a step, over all ranks.
        tables: by name; a table that is missing has one id per bag, drawn evenly from its rows.
        id_bytes: of an id on its way.
    """

    global_batch_size: int = 8192
    tables: Mapping[str, TableUsage] = field(default_factory=dict)
    id_bytes: int = 8

    def of(self, config: TableConfig) -> TableUsage:
        """Return what is known about a table."""
        features = float(len(config.features))
        return self.tables.get(config.name) or TableUsage(ids_per_sample=features, bags_per_sample=features)

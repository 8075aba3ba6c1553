"""What is left of a run when it has ended: `summary.json` and `tables.json`."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from dlrm.data.dataset import Dataset
from dlrm.data.value_names import name_values
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.metrics.metrics import MetricValues
from dlrm.training.guards import find_tables
from dlrm.training.run_log import write_json
from dlrm.training.table_statistics import describe_rows

SUMMARY, TABLES = "summary.json", "tables.json"


def write_summary(
    folder: Path,
    model: nn.Module,
    values: Mapping[str, Any],
    further: Mapping[str, Any],
    course: Mapping[str, Any],
    *,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Write both files and return the summary, the same on every rank (a collective call).

    Args:
        folder: the run's folder.
        model: whose tables are described.
        values: measured at the end, as described by `describe_values`.
        further: what is known besides, at the end of the summary.
        course: of the run: samples, seconds, why it stopped and so on.
        ranks: rank 0 writes, of itself but for the tables; the memory is that of the rank that has needed most.
    """
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary = {
        **values,
        "folder": str(folder),
        "samples_per_second": course["samples"] / max(course["seconds"], 1e-9),
        "peak_rss_bytes": max(ranks.gather(peak_rss)),
        **course,
        **further,
    }
    tables = describe_rows(find_tables(model), ranks)
    if ranks.is_first:
        write_json(folder / TABLES, {"tables": tables})
        write_json(folder / SUMMARY, summary)
    return ranks.object_from_first(summary)


def describe_values(values: MetricValues, dataset: Dataset, segment_by: str | None) -> dict[str, Any]:
    """Return metrics by name; the samples measured are `split_samples`, beside the `samples` trained."""
    described = asdict(values)
    described["split_samples"] = described.pop("samples")
    if segment_by is not None:
        names = name_values(dataset, segment_by, [segment.segment for segment in values.segments])
        for segment, name in zip(described["segments"], names, strict=True):
            segment["name"] = name
    return described

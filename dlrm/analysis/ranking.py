"""What the report says of runs that are judged by where the right item ranks, and not by clicks."""

from __future__ import annotations

from typing import Any

from dlrm.analysis.quantities import format_count, format_number, format_share
from dlrm.analysis.run_folder import Record, Run

NAMES = {"recall": "Recall", "ndcg": "NDCG"}
MANY_TIES = 0.5  # other items per user


def is_ranked(record: Record | None) -> bool:
    """Whether a measurement is of ranks."""
    return record is not None and "ndcg_10" in record


def describe_quality(record: Record, split: str) -> str:
    """Say how well the right items rank."""
    return (
        f"The right item is among the first 10 for {format_share(record['recall_10'])} of "
        f"{format_count(record['split_samples'])} users of the {split} split, {describe_filter(record)}: recall@10 "
        f"{record['recall_10']:.4f}, NDCG@10 {record['ndcg_10']:.4f}, MRR@10 {record['mrr_10']:.4f}."
    )


def describe_filter(record: Record) -> str:
    """Say which items were ranked, without which no two numbers can be compared."""
    said = (
        "filtered (without items seen before)" if record.get("filter_seen") else "unfiltered (with items seen before)"
    )
    return f"{said}, of targets that training saw alone" if record.get("skip_unseen_targets") else said


def list_complaints(record: Record) -> list[str]:
    """Return what the reader should not overlook, a sentence each."""
    if (record.get("ties") or 0.0) <= MANY_TIES:
        return []
    return [
        f"On average {record['ties']:,.1f} other items score exactly what the right one does; all of them were counted "
        "as better. Vectors that have collapsed do that."
    ]


def list_figures(record: Record) -> list[dict[str, Any]]:
    """Return the numbers at the top of the page."""
    kind = _name_kind(record)
    bias, best = record.get("popularity_bias_10"), record.get("best_recall_10")
    of_recall = kind if best is None else f"{kind}; best possible {best:.4f}"
    return [
        {"label": "Recall@10", "value": format_number(record.get("recall_10")), "note": of_recall},
        {"label": "NDCG@10", "value": format_number(record.get("ndcg_10")), "note": kind},
        {"label": "MRR@10", "value": format_number(record.get("mrr_10")), "note": kind},
        {
            "label": "Coverage@10",
            "value": format_share(record.get("coverage_10")),
            "note": "of the catalogue" if bias is None else f"popularity bias {bias:+.2f}",
        },
    ]


def describe_kind(run: Run) -> str:
    """Say of which kind the numbers of the valid split are."""
    return _name_kind(run.validation[-1]) if run.validation else ""


def _name_kind(record: Record) -> str:
    kind = "filtered" if record.get("filter_seen") else "unfiltered"
    return f"{kind}, trained targets" if record.get("skip_unseen_targets") else kind

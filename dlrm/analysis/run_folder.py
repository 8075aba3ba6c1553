"""Reads the folder of a run, finished or not, for whoever looks at it afterwards; needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrm.training.run_log import METRICS, read_records

CONFIG, SUMMARY, TABLES = "config.json", "summary.json", "tables.json"
EMBEDDING_SPACE = "embedding_space.json"

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run has written so far; numbers that were not finite are None.

    Attributes:
        folder: where it lies.
        config: as resolved by the command; empty for a run of the Python API.
        training: records of the train loss, in the order of samples.
        validation: records of measurements on the valid split, likewise.
        summary: None while the run is not finished.
        stopped: what stopped it, a guard or an interruption, if it has not been continued since.
        tables: one object per table; empty while the run is not finished.
        written_at: seconds since 1970 of the last sign of life.
    """

    folder: Path
    config: dict[str, Any]
    training: list[Record]
    validation: list[Record]
    summary: Record | None
    stopped: str | None
    tables: list[Record]
    written_at: float

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return str(self.config.get("recipe") or self.folder.resolve().name)

    @property
    def last_measured(self) -> Record | None:
        """The summary, or else the last measurement on the valid split."""
        return self.summary or (self.validation[-1] if self.validation else None)

    @property
    def measured_split(self) -> str:
        """The split that `last_measured` is about."""
        return str(self.summary.get("split", "test")) if self.summary else "valid"

    @property
    def samples(self) -> int:
        """Training samples seen, as far as is written down."""
        last = self.summary or max(self.training + self.validation, key=lambda record: record["samples"], default={})
        return int(last.get("samples", 0))

    @property
    def seconds(self) -> float:
        """Seconds of training, as far as is written down; evaluation and checkpoints are not counted."""
        records = [self.summary] if self.summary else self.training + self.validation
        return max((record.get("seconds") or 0.0 for record in records), default=0.0)


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: it is no folder of a run, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"expected the folder of a run, got {folder}, which is no folder; `recforge train` makes one")
    files = [path for name in (METRICS, CONFIG, SUMMARY, TABLES) if (path := folder / name).is_file()]
    if not files:
        raise ValueError(
            f"{folder}: expected the folder of a run, found neither {METRICS} nor {CONFIG} nor {SUMMARY} in it; "
            "give the --output of `recforge train`"
        )
    try:
        records = list(read_records(folder))
    except ValueError as error:
        raise ValueError(
            f"{folder / METRICS}: expected a JSON object per line, got {error}; remove that line"
        ) from error
    summary = read_object(folder / SUMMARY)
    if summary and any(record["samples"] > summary["samples"] for record in records):
        summary = None  # of a run that has since been continued
    # The measurement at the very end bears its split's name too, and neither a loss nor seconds.
    return Run(
        folder=folder,
        config=read_object(folder / CONFIG) or {},
        training=[record for record in records if record["kind"] == "train" and "loss" in record],
        validation=[record for record in records if record["kind"] == "valid" and "seconds" in record],
        summary=summary,
        stopped=records[-1]["why"] if records and records[-1]["kind"] == "stopped" else None,
        tables=(read_object(folder / TABLES) or {}).get("tables", []) if summary else [],
        written_at=max(path.stat().st_mtime for path in files),
    )


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}; restore the file or train anew") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(content).__name__}; restore the file or train anew"
        )
    return content

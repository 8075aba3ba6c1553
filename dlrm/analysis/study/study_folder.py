"""The memory of a study: a line per finished trial, written at once, so that what was killed goes on; free of torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from dlrm.training.run_config import leaves
from dlrm.training.run_log import finite, write_json

STUDY, TRIALS = "study.json", "trials.jsonl"

Record = dict[str, Any]


class StudyFolder:
    """A study's folder, open: `study.json` says what is studied, `trials.jsonl` holds a line per finished trial.

    Args:
        folder: made if it does not exist; if it holds a study of the same settings, that study goes on.
        kind: of the study.
        settings: everything that decides what a trial gives.
        total: trials that there will be, for the progress bar.
        quiet: show no progress bar.

    Raises:
        ValueError: `folder` holds a study of other settings, or another process is at it.
    """

    def __init__(
        self, folder: Path, *, kind: str, settings: Mapping[str, Any], total: int | None = None, quiet: bool = False
    ) -> None:
        self.folder, self.kind = folder, kind
        self._settings = dict(json.loads(json.dumps(finite({"kind": kind, **settings}), default=str)))
        self._total, self._quiet = total, quiet
        self.records: dict[str, Record] = {}
        self._shown: set[str] = set()

    def __enter__(self) -> StudyFolder:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"--output: another process is at the study in {self.folder}; wait for it or choose another folder"
            ) from None
        try:
            self._check_same_study()
            self.records = read_trials(self.folder)
            self._drop_half_a_line()
            write_json(self.folder / STUDY, self._settings)
        except BaseException:
            self._lock.release()
            raise
        self._file = (self.folder / TRIALS).open("a", encoding="utf-8")
        self._bar = tqdm(
            total=self._total,
            unit=" trials",
            desc=f"study {self.kind}",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
            disable=self._quiet,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        self._file.close()
        self._lock.release()

    def trial(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> Record:
        """Return the record of a trial; it is computed where there is none, and on the disk when this returns.

        Args:
            name: of the trial, unique in the study.
            compute: gives what JSON can hold; NaN and infinities become null.
        """
        if name not in self.records:
            start = time.perf_counter()
            result = json.loads(json.dumps(finite(dict(compute()))))
            record = {"trial": name, **result, "seconds": round(time.perf_counter() - start, 3)}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.records[name] = record
        if name not in self._shown:
            self._shown.add(name)
            self._bar.update()
        return self.records[name]

    def expect(self, more: int) -> None:
        """Note that there will be so many more trials (or fewer, below 0) than the progress bar knows of."""
        self._bar.total = (self._bar.total or 0) + more
        self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if not self._quiet:
            self._bar.write(line, file=sys.stderr)

    def _check_same_study(self) -> None:
        path = self.folder / STUDY
        if not path.is_file():
            return
        before, now = dict(leaves(json.loads(path.read_text(encoding="utf-8")))), dict(leaves(self._settings))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"--output: {self.folder} holds a study with {name} = {before.get(name)}, got {now.get(name)}; "
                    "choose another folder, or repeat that study's flags to go on with it"
                )

    def _drop_half_a_line(self) -> None:
        path = self.folder / TRIALS
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)


def read_trials(folder: Path) -> dict[str, Record]:
    """Return what is recorded of a study's trials, by name; a last line cut short by a kill is left out.

    Raises:
        ValueError: a line is damaged.
    """
    path = folder / TRIALS
    if not path.is_file():
        return {}
    records: dict[str, Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                record = json.loads(line)
                records[record["trial"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: expected a trial as JSON, got {error}; remove it") from error
    return records

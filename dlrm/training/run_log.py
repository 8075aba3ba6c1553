"""What a run writes while it goes: metrics.jsonl, TensorBoard events and the progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

METRICS = "metrics.jsonl"


class RunLog:
    """A run's measurements, one JSON object per line; a resumed run continues where its checkpoint was taken.

    Args:
        folder: the run's folder.
        samples: how far the run has come; what was written beyond is from a past that did not last, and is dropped.
        total: samples of the whole run, for the progress bar.
    """

    def __init__(self, folder: Path, *, samples: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / METRICS
        _keep_up_to(self.path, samples)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._events = SummaryWriter(str(folder), purge_step=samples + 1 if samples else None)
        self._bar = tqdm(
            total=total,
            initial=samples,
            unit=" samples",
            unit_scale=True,
            desc="training",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )

    def advance(self, samples: int, loss: float, remark: str = "") -> None:
        """Move the progress bar, whose last columns are the loss and a remark."""
        self._bar.set_postfix_str(f"loss={loss:.4f}" + (f", {remark}" if remark else ""), refresh=False)
        self._bar.update(samples)

    def record(
        self, kind: str, samples: int, values: Mapping[str, Any], stages: Mapping[str, Any] | None = None
    ) -> None:
        """Write measurements taken after `samples` samples; numbers go to TensorBoard as `<kind>/<name>` too.

        Args:
            kind: of the record.
            samples: how far the run has come.
            values: numbers by name, and whatever JSON can hold.
            stages: by name, what is known of the stages of the steps since the last such record; the `share` of each
                goes to TensorBoard as `stage/<name>`.
        """
        record = {"kind": kind, "samples": samples, **values}
        self._file.write(json.dumps(finite(record if stages is None else record | {"stages": stages})) + "\n")
        shares = {f"stage/{name}": stage["share"] for name, stage in (stages or {}).items()}
        for name, value in ({f"{kind}/{name}": value for name, value in values.items()} | shares).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self._events.add_scalar(name, value, samples)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Write out what is pending."""
        self._bar.close()
        self._events.close()
        self._file.close()


class SilentLog(RunLog):
    """Stands in for the log on ranks other than the first, which alone speaks."""

    def __init__(self) -> None:
        pass

    def advance(self, samples: int, loss: float, remark: str = "") -> None:
        """Move nothing."""

    def record(
        self, kind: str, samples: int, values: Mapping[str, Any], stages: Mapping[str, Any] | None = None
    ) -> None:
        """Write nothing."""

    def say(self, line: str) -> None:
        """Print nothing."""

    def close(self) -> None:
        """Close nothing."""


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = folder / METRICS
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is there whole or not at all; NaN and infinities become null."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(finite(dict(content)), indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def finite(value: Any) -> Any:
    """Replace numbers that JSON does not know by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _keep_up_to(path: Path, samples: int) -> None:
    if not path.is_file():
        return
    # What was written at an end is written again at the next one.
    lasting = ("train", "valid")
    kept = [r for r in read_records(path.parent) if r["samples"] <= samples and r["kind"] in lasting]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(scratch, path)

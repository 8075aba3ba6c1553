"""Shows on the terminal how far `prepare` has come: one bar per stage, with rows per second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from dlrm.data.work import Progress

FORMAT = "{desc:>8} {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"


class ProgressBar:
    """A bar per stage; call it as a `Progress`."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""

    def __call__(self, stage: str, share: float, rows: int) -> None:
        """Show that `share` of a stage is done."""
        if self._bar is None or self._stage != stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(desc=stage, total=1.0, bar_format=FORMAT, disable=None, leave=True)
        if self._bar.disable:
            return
        seconds = max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(f"{rows:,} rows, {rows / seconds:,.0f}/s", refresh=False)
        self._bar.update(share - self._bar.n)

    def close(self) -> None:
        """End the bar of the current stage."""
        if self._bar is not None:
            self._bar.close()

    @staticmethod
    @contextmanager
    def unless(progress: Progress | None) -> Iterator[Progress]:
        """Give `progress`, or a bar if there is none."""
        if progress is not None:
            yield progress
            return
        bar = ProgressBar()
        try:
            yield bar
        finally:
            bar.close()

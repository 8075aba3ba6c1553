"""What `recforge train` does before the loop: it takes as long as tables are large, and no hang is seen in that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dlrm.data.dataset import Dataset
from dlrm.distributed.hang_watch import UNTIMED, HangWatch
from dlrm.recipes import find_recipe
from dlrm.training import command


class EnoughError(Exception):
    """Nothing more is to be seen."""


def test_tables_are_built_in_a_stage_without_a_limit(
    monkeypatch: pytest.MonkeyPatch, click_log: Dataset, tmp_path: Path
) -> None:
    watches: list[HangWatch] = []
    stages: list[str] = []

    def enter(watch: HangWatch) -> HangWatch:
        watches.append(watch)
        return watch

    def build(*_: object, **__: object) -> None:
        stages.extend(watches[0]._followed[0].open)
        raise EnoughError

    monkeypatch.setattr(HangWatch, "__enter__", enter)
    monkeypatch.setattr("dlrm.model.build_dlrm", build)
    monkeypatch.setattr(command, "_provide", lambda *_: click_log)
    recipe = find_recipe("synthetic")
    with pytest.raises(EnoughError):
        command.train("synthetic", recipe, replace(recipe.config, output=tmp_path / "run"))
    assert stages == ["building tables"]
    assert set(stages) <= set(UNTIMED)

"""What a trainer opens of its servers is closed again, also where something is refused on the way."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlrm.asynchronous.config import AsynchronousConfig, ServersConfig
from dlrm.asynchronous.servers import Shards
from dlrm.asynchronous.train import run_trainer, train
from dlrm.recipes import find_recipe
from embeddings import TableConfig
from parameter_server.client.rows_client import RowsClient
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, Refusal, RefusedError
from parameter_server.processes.local_run import LocalRun
from parameter_server.shard.control import ShardControl


def test_tables_that_are_refused_leave_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    closed, close = [], RowsClient.close
    monkeypatch.setattr(RowsClient, "close", lambda client: (closed.append(client), close(client)))

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("expected other tables")

    monkeypatch.setattr("dlrm.asynchronous.servers.RemoteTables", refuse)
    table = TableConfig(name="a", num_rows=10, dim=4)
    description = RunDescription(run_id=1, seed=0, tables=(table,), durability="none")
    with LocalRun(description) as run, pytest.raises(ValueError, match="expected other tables"):
        Shards(run.client, run.connect, description, ServersConfig())
    assert len(closed) == 1


def test_a_snapshot_that_cannot_be_taken_is_told_and_ends_no_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = TableConfig(name="a", num_rows=10, dim=4)
    description = RunDescription(run_id=1, seed=0, tables=(table,), durability="snapshot")
    taken, take = [], ShardControl.snapshot
    refusals = iter([RefusedError(Refusal.UNAVAILABLE, "shard 0 is away"), ConnectionLost("reset")])

    def snapshot(control: ShardControl) -> Any:
        if (error := next(refusals, None)) is not None:
            raise error
        taken.append(control)
        return take(control)

    monkeypatch.setattr(ShardControl, "snapshot", snapshot)
    with (
        LocalRun(description, folder=tmp_path) as run,
        closing(Shards(run.client, run.connect, run.description, ServersConfig())) as shards,
    ):
        for _ in range(3):
            shards.save()
            shards.wait()
        assert len(run.client.status().snapshots) == len(taken) == 1
    told = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in told] == ["shard 0 is away", "reset"]


def test_a_coordinator_that_is_not_named_names_its_flag(tmp_path: Path) -> None:
    recipe = find_recipe("synthetic")
    with pytest.raises(ValueError, match=r"^--servers.coordinator: expected HOST:PORT or unix:/PATH, got ''"):
        train("synthetic", recipe, replace(AsynchronousConfig.of(recipe.config), output=tmp_path))
    with pytest.raises(ValueError, match=r"^--servers.coordinator: expected HOST:PORT or unix:/PATH, got 'nowhere'"):
        run_trainer(["synthetic", "--output", str(tmp_path), "--servers.coordinator", "nowhere"])

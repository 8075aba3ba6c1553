"""A shard's folder is its own: used by one process, of one run, whole whatever ends it; and saving stops nobody."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from parameter_server.shard import journal
from parameter_server.shard.shard import Shard


class KilledError(BaseException):
    """Stands for the end of the process."""


def test_a_folder_is_of_one_shard_and_one_run_and_used_once(run):
    shard = run.start(durability="snapshot")
    with pytest.raises(ValueError, match="got one that another uses"):
        run.start()
    shard.close()
    with pytest.raises(ValueError, match="expected the folder of run 7, shard 1"):
        run.start(1, name="shard-0")
    with pytest.raises(ValueError, match="expected the run's seed"):
        run.start(seed=5)
    with pytest.raises(ValueError, match="expected a folder for its journal"):
        Shard(replace(run.description, durability="journal"), 0)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_whoever_is_killed_while_the_folder_is_new_starts_again(run, monkeypatch, call):
    def end(*_):
        raise KilledError

    with monkeypatch.context() as killed:
        killed.setattr(os, call, end)
        with pytest.raises(KilledError):
            run.start(durability="snapshot")
    assert not (run.folder / "shard-0" / "shard.json").exists()
    shard = run.start(durability="snapshot")
    assert run.push(shard, 0, 1)


@pytest.mark.parametrize("content", ["", '{"number": 0, "descr', "[1]", '{"number": 0}', "\x00"])
def test_a_damaged_description_is_one_line_that_names_it(run, content):
    run.start(durability="snapshot").close()
    path = run.folder / "shard-0" / "shard.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected the number and run of a shard, got ") as error:
        run.start()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_snapshot_waits_for_the_disk_without_the_lock(run, monkeypatch):
    shard = run.start(durability="journal")
    held, sync = [], journal._sync_data
    monkeypatch.setattr(journal, "_sync_data", lambda file: (held.append(shard._guarded._lock.locked()), sync(file)))
    monkeypatch.setattr(shard._guarded, "settle", lambda *_: None)  # pushes under way, that nobody has synced
    for clock in range(1, 4):
        run.push(shard, 0, clock)
    shard.snapshot()
    assert held == [False]

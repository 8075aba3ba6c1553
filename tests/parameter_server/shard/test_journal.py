"""What is synced, and that a failed sync is not asked for again: Linux may say that all is well, though it is lost."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from parameter_server.shard import journal as shard_journal
from parameter_server.shard.journal import Journal, read_journal
from parameter_server.shard.records_file import Kind, Record


@pytest.fixture
def journal(tmp_path: Path, monkeypatch):
    """A journal whose first sync fails, and no other."""
    made = Journal(tmp_path, 1, "group")
    failures = [OSError(errno.EIO, "Input/output error")]

    def fail_once(file: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(shard_journal, "_sync_data", fail_once)
    made.append(Kind.CLAIM, 0.0, [b"one"])
    yield made
    made.close()


@pytest.mark.parametrize("first", ["settle", "begin_segment"])
@pytest.mark.parametrize("second", ["settle", "begin_segment"])
def test_after_a_sync_that_failed_nothing_is_said_to_be_kept(journal, first, second):
    calls = {"settle": lambda: journal.settle(1), "begin_segment": journal.begin_segment}
    for call in (first, second, "settle"):
        with pytest.raises(OSError, match="Input/output error"):
            calls[call]()


def test_who_waits_while_a_new_segment_fails_is_told(journal, monkeypatch):
    fail_once, waiting, told = shard_journal._sync_data, threading.Event(), []

    def settle() -> None:
        waiting.set()
        try:
            journal.settle(1)
        except OSError as error:
            told.append(error)

    waiter = threading.Thread(target=settle)

    def fail_while_somebody_waits(file: int) -> None:
        monkeypatch.setattr(shard_journal, "_sync_data", fail_once)
        waiter.start()
        waiting.wait()
        fail_once(file)

    monkeypatch.setattr(shard_journal, "_sync_data", fail_while_somebody_waits)
    with pytest.raises(OSError, match="Input/output error"):
        journal.begin_segment()
    waiter.join(10)
    assert [error.errno for error in told] == [errno.EIO]


def test_a_segment_that_cannot_be_made_is_an_error_for_all_that_follows(journal, monkeypatch):
    monkeypatch.setattr(shard_journal, "_sync_data", lambda file: None)
    with monkeypatch.context() as broken:
        broken.setattr("os.open", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            journal.begin_segment()
    journal.settle(1)  # what was synced before is kept
    with pytest.raises(OSError, match="No space left"):
        journal.begin_segment()


def test_segments_after_the_first_are_synced_from_their_beginning(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1, "group")
    for length in (100_000, 10):
        journal.append(Kind.PUSH, 0.0, [bytes(length)])
        journal.settle(journal.position)
        journal.begin_segment()
    journal.close()
    assert [len(record.body) for record in read_journal(tmp_path, 1) if isinstance(record, Record)] == [100_000, 10]

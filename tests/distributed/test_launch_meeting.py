"""Ranks meet over a store that remembers earlier starts, are found alike or told apart, and speak with one voice."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from dlrm.cli import Command, run
from dlrm.distributed import one_voice
from dlrm.distributed.launch import check_room
from dlrm.distributed.one_voice import OneVoice
from dlrm.distributed.place import Place
from dlrm.distributed.process_group import check_alike, leave, meet, open_store


def on_ranks(count, function, delays=()):
    """Call function(place) in a thread per rank; return results or errors by rank."""
    results = {}

    def call(rank):
        time.sleep(delays[rank] if delays else 0)
        try:
            results[rank] = function(Place(rank=rank, count=count, per_node=count))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(count)]


def test_each_start_gets_a_name_of_its_own_although_the_store_remembers_the_last_one():
    store, names = HashStore(), []
    for delays in [(0, 0, 0), (0.2, 0, 0.1), (0, 0.2, 0), (0.1, 0.2, 0)]:
        found = on_ranks(3, lambda place: meet(store, place, seconds=10), delays)
        assert len(set(found)) == 1, found
        names.append(found[0])
    assert len(set(names)) == 4


def test_a_rank_that_does_not_come_is_named():
    store = HashStore()
    on_ranks(3, lambda place: meet(store, place, seconds=10))  # an earlier start, where all came
    here = lambda place: meet(store, place, seconds=0.3) if place.rank != 1 else None  # noqa: E731
    assert str(on_ranks(3, here)[0]) == "expected all ranks within 0.3 s, waited in vain for rank 1"


def test_a_port_in_use_is_told_with_the_variable(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="expected MASTER_ADDR and MASTER_PORT of the ranks' store"):
        open_store(Place(count=2, per_node=2))
    with socket.create_server(("", 0)) as other:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(ValueError, match=r"MASTER_PORT=\d+: expected a free port for the ranks' store, got: "):
            open_store(Place(count=2, per_node=2))


def test_ranks_that_differ_are_told_on_all_with_the_setting_and_both_values():
    store = HashStore()

    def check(place):
        check_alike(store, place, {"seed": 1, "model.top": (64, 32)}, "cure", seconds=10)
        size = 512 if place.rank == 1 else 1024
        check_alike(store, place, {"seed": 1, "step.global_batch_size": size}, "start all alike", seconds=10)

    told = on_ranks(3, check)
    assert {str(error) for error in told} == {
        "rank 1 has step.global_batch_size = 512, rank 0 has 1024; start all alike"
    }
    assert all(isinstance(error, ValueError) for error in told)


def test_a_setting_that_one_rank_lacks_is_told():
    store = HashStore()
    told = on_ranks(2, lambda place: check_alike(store, place, {"a": 1} if place.rank else {"a": 1, "b": 2}, "cure"))
    assert str(told[0]) == "rank 1 has b = None, rank 0 has 2; cure"


def test_ranks_leave_together_or_after_some_time():
    store = HashStore()
    starts = on_ranks(2, lambda place: (leave(store, place, 10), time.monotonic())[1], (0, 0.5))
    assert abs(starts[0] - starts[1]) < 0.4
    before = time.monotonic()
    leave(HashStore(), Place(rank=1, count=2, per_node=2), 0.3)
    assert 0.3 <= time.monotonic() - before < 2


def test_place_is_read_from_what_torchrun_sets(tmp_path):
    assert Place.from_environment({}) == Place()
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    place = Place.from_environment(given | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_0/1/error.json")})
    assert (place.rank, place.count, place.local_rank, place.per_node) == (5, 8, 1, 4)
    assert place.is_launched
    assert place.notes == tmp_path / "attempt_0"
    with pytest.raises(ValueError, match="expected a rank below the number of ranks in the environment, got RANK=8"):
        Place.from_environment(given | {"RANK": "8"})
    with pytest.raises(ValueError, match="WORLD_SIZE=many"):
        Place.from_environment(given | {"WORLD_SIZE": "many"})


def test_more_ranks_than_memory_holds_are_refused_before_any_starts():
    check_room(2)
    with pytest.raises(
        ValueError, match=r"--ranks 1000000: expected at most \d+ in [\d.]+ GB of memory, as each takes"
    ):
        check_room(1_000_000)


def speak(capsys, monkeypatch, errors, *, store=None, notes=None):
    """Let ranks fail one after the other, as commands; return their statuses and what they print."""
    monkeypatch.delenv("RECFORGE_TRACEBACK", raising=False)
    statuses = []
    for rank, error in enumerate(errors):

        def command(argv, rank=rank, error=error):
            with OneVoice(Place(rank=rank, count=len(errors), notes=notes)) as voice:
                voice.store = store
                raise error

        monkeypatch.setattr(Command, "run", lambda self, argv, command=command: command(argv))
        try:
            statuses.append(run({"x": Command("", "")}, ["x"]))
        except SystemExit as stop:
            statuses.append(stop.code)
    lines = capsys.readouterr().err.splitlines()
    return statuses, [line for line in lines if line]  # other ranks than 0 begin a new one, beside its progress bar


@pytest.mark.parametrize("met", [False, True])
def test_an_error_of_all_ranks_is_one_line(met, capsys, monkeypatch, tmp_path):
    errors = [ValueError("--seed: expected a number"), ValueError("--seed: expected a number")]
    where = {"store": HashStore()} if met else {"notes": tmp_path}
    statuses, lines = speak(capsys, monkeypatch, errors, **where)
    assert statuses == [2, 2]
    assert lines == ["recforge: error: rank 0: --seed: expected a number"]


def test_ranks_that_lose_their_connections_leave_the_word_to_the_one_that_failed(capsys, monkeypatch):
    monkeypatch.setattr(one_voice, "WAIT_SECONDS", 0.2)
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:17391")
    statuses, lines = speak(capsys, monkeypatch, [ValueError("bad data"), gloo], store=HashStore())
    assert (statuses, lines) == ([2, 2], ["recforge: error: rank 0: bad data"])
    # Where the other one could say nothing, as it was killed.
    statuses, lines = speak(capsys, monkeypatch, [gloo, dist.DistError("gone")], store=HashStore())
    assert statuses == [1, 1]
    (line,) = lines
    assert line.startswith("recforge: error: rank 0 lost its connection to another rank")
    assert line.endswith("Connection closed by peer [127.0.0.1]:17391")


@pytest.mark.parametrize("told", ["Connection reset by peer", ""])
def test_a_lost_connection_is_no_error_of_the_user_whoever_notices(told, capsys, monkeypatch):
    monkeypatch.setattr(one_voice, "WAIT_SECONDS", 0.2)
    statuses, lines = speak(capsys, monkeypatch, [ConnectionResetError(told)] * 2, store=HashStore())
    assert statuses == [1, 1]  # which another start may follow
    reason = told or "ConnectionResetError"
    assert lines == [
        "recforge: error: rank 0 lost its connection to another rank, which has ended or cannot be reached: " + reason
    ]


class LostStore:
    """A store whose keeper has been killed."""

    def compare_set(self, key, expected, desired):
        raise dist.DistNetworkError("Broken pipe")


def test_ranks_whose_store_has_gone_still_speak_once_on_each_machine(capsys, monkeypatch, tmp_path):
    stop = KeyboardInterrupt("and saved after 64 samples")
    statuses, lines = speak(capsys, monkeypatch, [stop, stop], store=LostStore(), notes=tmp_path)
    assert statuses == [130, 130]
    assert lines == ["recforge: error: interrupted and saved after 64 samples"]


def test_a_rank_that_speaks_beside_the_progress_bar_of_another_begins_a_new_line(capsys, monkeypatch):
    monkeypatch.delenv("RECFORGE_TRACEBACK", raising=False)
    for rank, start in enumerate(("", "\n")):
        with pytest.raises(KeyboardInterrupt), OneVoice(Place(rank=rank, count=2, per_node=2)):
            raise KeyboardInterrupt
        assert capsys.readouterr().err == start


def test_what_nobody_expected_is_told_by_its_kind(capsys, monkeypatch):
    statuses, lines = speak(capsys, monkeypatch, [KeyError("C1"), KeyError("C1")], store=HashStore())
    assert statuses == [1, 1]
    assert lines == ["recforge: error: RuntimeError: rank 0: KeyError: 'C1' (RECFORGE_TRACEBACK=1 shows where)"]


def test_an_interruption_of_all_ranks_is_one_line(capsys, monkeypatch):
    stop = KeyboardInterrupt("and saved after 64 samples")
    statuses, lines = speak(capsys, monkeypatch, [stop, stop, stop], store=HashStore())
    assert statuses == [130, 130, 130]
    assert lines == ["recforge: error: interrupted and saved after 64 samples"]


def test_a_rank_speaks_twice_rather_than_not_at_all(capsys, monkeypatch, tmp_path):
    errors = [ValueError("bad"), ValueError("bad")]
    _, lines = speak(capsys, monkeypatch, errors, notes=Path(tmp_path / "gone"))
    assert lines == ["recforge: error: rank 0: bad", "recforge: error: rank 1: bad"]

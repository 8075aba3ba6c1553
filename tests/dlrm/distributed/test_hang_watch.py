"""Who hangs: told from what ranks publish, in time, of the right rank, and not while anything moves."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from torch._C._distributed_c10d import HashStore

from dlrm.distributed.hang_watch import UNTIMED, HangWatch, Pulse, find_hung, is_sibling, look, read_pulse
from dlrm.distributed.one_voice import OneVoice
from dlrm.distributed.place import Place
from dlrm.distributed.process_group import Group
from dlrm.distributed.ranks import Ranks
from embeddings.stopwatch import Stopwatch

TIMEOUT = 10.0


def watch(course):
    """Show a watcher, second after second, what ranks publish; return when it speaks and its line."""
    seen = {}
    for now, pulses in enumerate(course):
        line = look(pulses, seen, float(now), TIMEOUT)
        if line is not None:
            return now, line
    return None


def at(beats, samples=100, stages=7, stage="lookup", **others):
    return Pulse(beats=beats, samples=samples, stages=stages, stage=stage, **others)


def test_the_rank_that_has_something_to_do_is_named_with_its_stage():
    course = [
        [at(s, 100 * min(s, 3), stage="ids all-to-all"), at(s, 100 * min(s, 3), stage="waiting for data")]
        for s in range(30)
    ]
    assert watch(course) == (
        13,
        "rank 1 hangs in 'waiting for data' for 10 s, after 300 samples; rank 0 waiting in 'ids all-to-all'",
    )


def test_the_rank_with_the_fewest_samples_then_stages_is_named():
    assert find_hung([at(1, 300), at(1, 200, 9), at(1, 200, 8)]) == [2]
    waiting = {"stage": "rows all-to-all"}
    assert find_hung([at(1, 200, 9, **waiting), at(1, 200, 8, **waiting)]) == [1]
    assert find_hung([at(1, 200, 8), at(1, 100, 3, left=True)]) == [0]
    # Both are in the same code: nothing tells them apart.
    assert find_hung([at(1, 200, 8), at(1, 200, 8), at(1, 200, 9)]) == [0, 1]


def test_a_stopped_process_is_named_although_it_may_be_ahead():
    course = [[at(s, 100), at(min(s, 4), 200, process=4711)] for s in range(30)]
    when, line = watch(course)
    assert when == 10
    assert line.startswith(
        "rank 1: no answer for 10 s (process 4711), last seen in 'lookup', after 200 samples; rank 0"
    )


def test_nothing_is_said_while_any_rank_comes_further():
    batches_of_an_evaluation = [[at(s, stages=s // 8, stage="evaluation"), at(s, stage="")] for s in range(200)]
    assert watch(batches_of_an_evaluation) is None


def test_what_comes_once_takes_as_long_as_it_takes():
    assert len(UNTIMED) == 4
    for stage in UNTIMED:
        assert watch([[at(s, stage=stage), at(s, stage=stage)] for s in range(200)]) is None
        assert watch([[at(min(s, 50), stage=stage), at(min(s, 50), stage=stage)] for s in range(200)]) is not None


def test_a_process_of_another_machine_is_nobodys_sibling():
    two = TwoRanks(timeout_seconds=1.0)
    two.watches[0]._publish(two.store)
    pulse = read_pulse(two.store.get("pulse/0"))
    assert is_sibling(pulse)  # of itself
    assert not is_sibling(replace(pulse, host=f"not {pulse.host}"))


def test_ranks_that_have_finished_are_told_apart():
    course = [[at(s, left=True), at(s, 80, stage="checkpoint")] for s in range(30)]
    assert watch(course) == (10, "rank 1 hangs in 'checkpoint' for 10 s, after 80 samples; rank 0 finished")
    assert watch([[at(s, left=True), at(s, left=True)] for s in range(30)]) is None


def test_many_ranks_are_told_in_short():
    stages = ["dense forward"] * 6 + ["gradients all-to-all"] * 40
    _, line = watch([[at(s, stage=stage) for stage in stages] for s in range(30)])
    assert line == (
        "ranks 0, 1, 2, 3 and 2 more hang in 'dense forward' for 10 s, after 100 samples; "
        "ranks 6, 7, 8, 9 and 36 more waiting in 'gradients all-to-all'"
    )


class TwoRanks:
    """Two ranks' watches in one process, over one store; each notes the status it would end with."""

    def __init__(self, timeout_seconds: float) -> None:
        self.store, self.ended = HashStore(), {}
        self.stopwatches = [Stopwatch(), Stopwatch()]
        self.watches = [self.make(rank, timeout_seconds) for rank in range(2)]

    def make(self, rank: int, timeout_seconds: float) -> HangWatch:
        place = Place(rank=rank, count=2, per_node=2)
        ranks = Ranks(rank=rank, count=2, per_node=2)
        group = Group(
            place=place, ranks=ranks, store=self.store, lasting_store=self.store, open_store=lambda: self.store
        )

        def end(status: int) -> None:
            self.ended[rank] = status

        watch = HangWatch(group, OneVoice(place), timeout_seconds=timeout_seconds, end=end)
        watch.follow(self.stopwatches[rank], lambda: 640)
        return watch


def test_threads_watch_and_one_of_them_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    two = TwoRanks(timeout_seconds=1.0)
    released = threading.Event()

    def rank(number: int) -> None:
        with two.watches[number], two.stopwatches[number].stage("waiting for data" if number else "ids all-to-all"):
            released.wait(20)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    while len(two.ended) < 2 and time.monotonic() < start + 20:
        time.sleep(0.02)
    took = time.monotonic() - start
    released.set()
    for thread in threads:
        thread.join()
    assert two.ended == {0: 1, 1: 1}
    assert 1.0 <= took < 5
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line == (
        "recforge: error: rank 1 hangs in 'waiting for data' for 1 s, after 640 samples; rank 0 waiting in "
        "'ids all-to-all' (--parallel.hang-timeout-seconds 1)"
    )


def test_ranks_that_move_and_leave_are_left_in_peace(capfd: pytest.CaptureFixture[str]) -> None:
    two = TwoRanks(timeout_seconds=0.5)

    def rank(number: int) -> None:
        with two.watches[number]:
            for _ in range(15):
                with two.stopwatches[number].stage("lookup"):
                    time.sleep(0.1)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert two.ended == {}
    assert capfd.readouterr().err == ""
    assert not any(watch._thread.is_alive() for watch in two.watches)

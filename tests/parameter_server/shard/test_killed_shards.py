"""Processes killed while they push and take snapshots: what they had acknowledged is there, or is counted as lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from itertools import count

import numpy as np
import pytest
import torch

LANES = (0, 1, 2)


def push_for_ever(run, pipe: int, first: dict[int, int], *, with_snapshots: bool) -> None:
    """Pushes from a thread per lane, and says each acknowledged push in a pipe, until somebody kills the process."""
    torch.set_num_threads(1)  # other threads of OpenMP do not survive the fork
    shard = run.start()

    def push(lane: int) -> None:
        try:
            for clock in count(first[lane]):
                run.push(shard, lane, clock, lease=1)
                os.write(pipe, bytes([lane]))
        finally:
            traceback.print_exc()
            os._exit(1)

    for lane in LANES:
        threading.Thread(target=push, args=(lane,)).start()
    while True:
        if with_snapshots:
            shard.snapshot()
        time.sleep(0.001)


def kill_after(run, first: dict[int, int], pushes: int, *, with_snapshots: bool) -> dict[int, int]:
    """Runs such a process until it has told of so many pushes; returns how many it has told of each lane."""
    read, write = os.pipe()
    arguments = (run, write, first)
    process = multiprocessing.get_context("fork").Process(
        target=push_for_ever, args=arguments, kwargs={"with_snapshots": with_snapshots}
    )
    process.start()
    os.close(write)
    told = b""
    while len(told) < pushes:
        told += (some := os.read(read, 4096))
        assert some, "the process ended by itself"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while rest := os.read(read, 4096):
        told += rest
    os.close(read)
    process.close()
    return {lane: told.count(lane) for lane in LANES}


@pytest.mark.parametrize("durability", ["journal", "snapshot"])
@pytest.mark.parametrize("with_snapshots", [False, True])
def test_a_killed_process_loses_nothing_or_says_what(run, durability, with_snapshots):
    run.start(durability=durability).close()
    told = dict.fromkeys(LANES, 0)
    for pushes in (1, 40, 150):
        first = {lane: told[lane] + 1 for lane in LANES}
        for lane, number in kill_after(run, first, pushes, with_snapshots=with_snapshots).items():
            told[lane] += number
        shard = run.start()
        table = run.pull(shard)
        applied = {lane: int(table[lane, 0]) for lane in LANES}
        acknowledged = {lane: order.frames for lane, order in shard._guarded.state.orders.lanes.items()}
        for lane, number in acknowledged.items():  # it may have been killed before it could tell
            assert told[lane] <= number <= told[lane] + 1
        lost = sum(acknowledged.values()) - sum(applied.values())
        assert shard.counts.lost_pushes == lost
        if durability == "journal":
            assert lost == 0
            pushed = [(lane, clock) for lane in LANES for clock in range(1, applied[lane] + 1)]
            np.testing.assert_array_equal(table, run.sums(pushed))
        for lane in LANES:  # the sender cannot know, and sends the next one again
            run.push(shard, lane, told[lane] + 1)
            assert not run.push(shard, lane, told[lane] + 1)
            told[lane] += 1
        if durability == "journal":
            pushed = [(lane, clock) for lane in LANES for clock in range(1, told[lane] + 1)]
            np.testing.assert_array_equal(run.pull(shard), run.sums(pushed))
        shard.close()

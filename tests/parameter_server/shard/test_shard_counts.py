"""What a shard counts is right for rows that go for want of room, and can be read while it works."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from parameter_server.description import Growth


def test_rows_that_go_for_want_of_room_are_counted(run):
    run.description = replace(run.description, growth={"a": Growth(max_bytes=2000)})
    shard = run.start(durability="journal")
    for clock in range(1, 20):
        run.push(shard, 0, clock)
    born = len(np.unique(np.concatenate([run.rows(0, clock)[0] for clock in range(1, 20)])))
    assert shard.counts.evicted_rows >= born - shard.num_rows[0] > 0
    assert shard.counts.evicted_rows == shard._state.tables[0].num_evicted
    assert run.start(1, (1,)).counts.evicted_rows == 0


def test_counts_are_read_while_lanes_push_for_the_first_time(run):
    shard = run.start(lanes=1024)
    is_over = threading.Event()
    copies, troubles = [], []

    def scrape():
        while not is_over.is_set():
            try:
                copies.append(shard.counts.copy())
            except RuntimeError as error:
                troubles.append(error)

    scraper = threading.Thread(target=scrape)
    scraper.start()
    for lane in range(300):
        run.push(shard, lane, 1, rows=run.rows(0, 1))
    is_over.set()
    scraper.join()
    assert troubles == []
    assert [copy.pushes for copy in copies] == sorted(copy.pushes for copy in copies)
    last = shard.counts.copy()
    run.push(shard, 300, 1, rows=run.rows(0, 1))
    assert last.staleness.sum() == last.pushes == 300

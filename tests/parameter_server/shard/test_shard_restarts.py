"""What a shard has acknowledged is there when it starts again, or is counted as lost: journals and snapshots."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from embeddings.row_optimizers import RowAdam
from embeddings.tables import TableConfig
from parameter_server.shard import folder as shard_folder
from parameter_server.shard.records_file import DamagedError
from parameter_server.shard.shard import Shard


def whole(shard: Shard) -> list[np.ndarray]:
    """All that a shard's tables hold, as bits, in an order of its own."""
    content = []
    for table in shard._guarded.state.tables:
        ids, rows = table.take()
        order = np.argsort(ids)
        content += [ids[order], rows[order].view(np.int32)]
    state = shard._guarded.state
    marks = [state.marks.lanes[lane] for lane in sorted(state.marks.lanes)]
    return [*content, *marks, state.orders.to_array(), np.array(shard.versions), state.claims]


def assert_same(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def push_floats(run, shard: Shard, clocks: range) -> None:
    """Pushes of three lanes in turn, with gradients whose order of summing shows in the bits."""
    for clock in clocks:
        for lane in (0, 1, 3):
            ids, _ = run.rows(lane, clock)
            gradients = np.random.default_rng([lane, clock]).normal(size=(len(ids), 4)).astype(np.float32)
            run.push(shard, lane, clock, seq=2 * clock - 1, table=0, rows=(ids, gradients))
            half = (ids, gradients.astype(np.float16))
            run.push(shard, lane, clock, seq=2 * clock, table=1, rows=half, factor=0.5)


@pytest.fixture
def adam(run):
    """A run whose updates depend on the number of the update and on the order of pushes."""
    tables = tuple(TableConfig(name=n, num_rows=500, dim=4, optimizer=RowAdam(learning_rate=0.01)) for n in ("a", "b"))
    run.description = replace(run.description, tables=tables)
    return run


@pytest.mark.parametrize("snapshots", [0, 1, 11])
def test_a_replayed_journal_gives_the_same_bits(adam, snapshots):
    shard = adam.start(durability="journal", journal_sync="none")
    for first in range(1, 13):
        push_floats(adam, shard, range(first, first + 1))
        if first <= snapshots:
            shard.snapshot()
    before = whole(shard)
    shard.close()
    again = adam.start(journal_sync="none")
    assert_same(whole(again), before)
    assert again.counts.replayed == (12 - snapshots) * 6 + (snapshots == 0)  # and its claim to the buckets
    assert (again.counts.lost_pushes, again.lines) == (0, [])
    push_floats(adam, again, range(13, 15))
    assert adam.push(again, 0, 14, seq=27) is False


def test_what_was_replayed_is_in_the_next_snapshot(adam):
    shard = adam.start(durability="journal")
    for first in range(1, 5):
        push_floats(adam, shard, range(first, first + 1))
        shard.close()
        shard = adam.start()
        before = whole(shard)
        if first > 1:
            shard.snapshot()
    shard.close()
    again = adam.start()
    assert_same(whole(again), before)
    assert again.counts.replayed == 0


def test_segments_before_a_snapshot_are_removed(run, monkeypatch):
    monkeypatch.setattr("parameter_server.shard.journal.SEGMENT_BYTES", 2000)
    shard = run.start(durability="journal")
    for clock in range(1, 11):
        run.push(shard, 0, clock)
    journal = run.folder / "shard-0" / "journal"
    assert len(list(journal.iterdir())) > 3
    shard.snapshot()
    assert len(list(journal.iterdir())) == 1
    run.push(shard, 0, 11)
    shard.close()
    again = run.start()
    assert again.counts.replayed == 1
    np.testing.assert_array_equal(run.pull(again), run.sums((0, clock) for clock in range(1, 12)))


def test_a_torn_tail_is_cut_and_said(run):
    shard = run.start(durability="journal")
    for clock in (1, 2, 3):
        run.push(shard, 0, clock)
    shard.close()
    (segment,) = (run.folder / "shard-0" / "journal").iterdir()
    (run.folder / "shard-0" / "acknowledged").unlink()
    content = segment.read_bytes()
    last = content.rindex(b"RCFJ")
    for torn in (content[: last + 20], content[:-1], content[:last] + bytes(300), content[:-8] + bytes(8)):
        segment.write_bytes(torn)
        again = run.start()
        np.testing.assert_array_equal(run.pull(again), run.sums([(0, 1), (0, 2)]))
        assert again.counts.torn_bytes == len(torn) - last
        assert f"{segment}: cut {len(torn) - last} bytes" in again.lines[0]
        assert run.push(again, 0, 3)
        again.close()
        for other in segment.parent.iterdir():
            other.unlink()
        (run.folder / "shard-0" / "acknowledged").unlink()


def test_damage_in_the_middle_is_an_error_that_says_where(run):
    shard = run.start(durability="journal")
    for clock in (1, 2, 3):
        run.push(shard, 0, clock)
    shard.close()
    (segment,) = (run.folder / "shard-0" / "journal").iterdir()
    content = segment.read_bytes()
    second = content.index(b"RCFJ", content.index(b"RCFJ", 10) + 10)
    for place in (second, second + 17, second + 100):  # the mark, the length, the body
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        segment.write_bytes(damaged)
        with pytest.raises(DamagedError, match=f"{segment}, byte {second}: expected record 3"):
            run.start()
    segment.write_bytes(content[second:])
    with pytest.raises(DamagedError, match="expected record 1, got record 3"):
        run.start()
    segment.rename(segment.with_name("00000000000000000009.log"))
    with pytest.raises(DamagedError, match="expected records from 1 on, got those from 9"):
        run.start()


def test_lost_pushes_are_counted_exactly(run):
    shard = run.start(durability="snapshot")
    for clock in (1, 2, 3):
        run.push(shard, 0, clock)
        run.push(shard, 1, clock)
    shard.snapshot()
    run.push(shard, 0, 4)
    run.push(shard, 0, 1, lease=2)  # counted, though all of it is known
    run.push(shard, 3, 1)
    shard.close()
    again = run.start()
    saved = [(lane, clock) for lane in (0, 1) for clock in (1, 2, 3)]
    np.testing.assert_array_equal(run.pull(again), run.sums(saved))
    assert again.counts.lost_pushes == 3
    assert "3 pushes that were acknowledged are lost" in again.lines[0]
    assert not run.push(again, 0, 1, lease=2)  # senders go on where they were
    assert run.push(again, 0, 5, lease=2, seq=2)
    assert run.push(again, 3, 2)
    again.close()  # and crashes before another snapshot: what was lost, and two more
    third = run.start()
    assert third.counts.lost_pushes == 5
    assert run.push(third, 1, 4)
    third.snapshot()
    run.push(third, 1, 5)
    third.close()
    assert run.start().counts.lost_pushes == 6


def test_without_durability_nothing_is_kept_and_all_is_counted(run):
    run.description = replace(run.description, durability="none")
    shard = Shard(run.description, 0, folder=run.folder / "x")
    run.shards.append(shard)
    run.route(shard, np.zeros(4096, np.int32), 1)
    run.push(shard, 0, 1)
    shard.close()
    again = Shard(run.description, 0, folder=run.folder / "x")
    run.shards.append(again)
    assert (again.counts.lost_pushes, again.num_rows) == (1, [0, 0])


def test_damaged_and_unfinished_snapshots_are_passed_over(run):
    shard = run.start(durability="snapshot")
    for clock in (1, 2, 3):
        run.push(shard, 0, clock)
        shard.snapshot()
    shard.close()
    folder = run.folder / "shard-0" / "snapshots"
    newest = sorted(folder.iterdir())[-1]
    file = newest / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    (folder / ".00000004-increment").mkdir()
    again = run.start()
    np.testing.assert_array_equal(run.pull(again), run.sums([(0, 1), (0, 2)]))
    assert f"{newest}: snapshot passed over: expected digest" in again.lines[0]
    assert again.counts.lost_pushes == 1
    run.push(again, 0, 4)
    assert again.snapshot().number == 3
    again.close()
    last = run.start()
    np.testing.assert_array_equal(run.pull(last), run.sums([(0, 1), (0, 2), (0, 4)]))
    assert len(last.lines) == 1  # of the lost push


def test_a_damaged_snapshot_that_the_journal_cannot_replace_is_an_error(run):
    shard = run.start(durability="journal")
    run.push(shard, 0, 1)
    shard.snapshot()
    run.push(shard, 0, 2)
    shard.close()
    manifest = run.folder / "shard-0" / "snapshots" / "00000001-base" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 9}))
    with pytest.raises(DamagedError, match="expected records from 1 on, got those from 3"):
        run.start()


def test_increments_are_merged_from_files_some_buckets_at_a_time(adam, monkeypatch):
    monkeypatch.setattr(shard_folder, "INCREMENTS", 3)
    monkeypatch.setattr(shard_folder, "PART_BYTES", 20_000)
    shard = adam.start(durability="snapshot")
    made = []
    for first in range(1, 7):
        push_floats(adam, shard, range(first, first + 1))
        made.append(shard.snapshot())
    assert [info.is_base for info in made] == [True, False, False, True, False, False]
    assert len(list((adam.folder / "shard-0" / "snapshots").iterdir())) == 3
    assert shard.counts.snapshots == 6
    assert 0 < shard.counts.snapshot_pause_seconds <= shard.counts.longest_pause_seconds
    before = whole(shard)
    shard.close()
    assert_same(whole(adam.start()), before)


def test_pushes_between_the_pieces_of_a_snapshot_are_in_it_whole_or_not_at_all(run, monkeypatch):
    monkeypatch.setattr(shard_folder, "PART_BYTES", 2000)
    shard = run.start(durability="snapshot")
    clocks = iter(range(1, 1000))
    for _ in range(4):
        run.push(shard, 0, next(clocks))
    pieces = []
    write = shard_folder.SnapshotFolder.write

    def push_between(self, parts):
        def pushed():
            for part in parts:
                yield part
                pieces.append(run.push(shard, 0, next(clocks)))

        return write(self, pushed())

    monkeypatch.setattr(shard_folder.SnapshotFolder, "write", push_between)
    for _ in range(3):
        shard.snapshot()
    assert len(pieces) > 12
    last = next(clocks) - 1
    shard.close()
    again = run.start()
    assert again.counts.lost_pushes == 1  # the one after the last piece
    np.testing.assert_array_equal(run.pull(again), run.sums((0, clock) for clock in range(1, last)))


def test_eviction_is_replayed(run):
    from parameter_server.description import Growth

    run.description = replace(run.description, growth={"a": Growth(evict_after_seconds=100.0)})
    shard = run.start(durability="journal")
    run.push(shard, 0, 1)
    gone = shard.evict(now=4e9)
    assert gone == len(run.rows(0, 1)[0])
    run.push(shard, 0, 2)
    before = whole(shard)
    assert shard.counts.evicted_rows == gone
    shard.close()
    again = run.start()
    assert_same(whole(again), before)
    again.snapshot()
    again.evict(now=4e9)
    again.snapshot()
    again.close()
    assert run.start().num_rows == [0, 0]

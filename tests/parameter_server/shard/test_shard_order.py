"""Pushes are applied in order and once: gaps, duplicates, leases, and chunks that another trainer computes again."""

from __future__ import annotations

import numpy as np
import pytest

from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import buckets_of, salt_of
from parameter_server.shard.shard import Shard
from parameter_server.wire import Flag, Header, Op, encode, join


def refusal_of(call, *args, **kwargs) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_a_gap_is_refused_and_says_what_is_missing(run):
    shard = run.start()
    assert run.push(shard, 0, 1)
    error = refusal_of(run.push, shard, 0, 3)
    assert (error.refusal, error.expected_seq) == (Refusal.OUT_OF_RANGE, 2)
    assert run.push(shard, 0, 2)
    assert run.push(shard, 0, 3)
    np.testing.assert_array_equal(run.pull(shard), run.sums([(0, 1), (0, 2), (0, 3)]))


def test_a_push_that_comes_again_changes_nothing(run):
    shard = run.start()
    assert [run.push(shard, 0, 1), run.push(shard, 0, 2), run.push(shard, 0, 1), run.push(shard, 0, 2)] == [
        True,
        True,
        False,
        False,
    ]
    np.testing.assert_array_equal(run.pull(shard), run.sums([(0, 1), (0, 2)]))
    assert (shard.counts.pushes, shard.counts.duplicates) == (2, 2)


def test_lanes_have_orders_of_their_own(run):
    shard = run.start()
    for lane, clock in [(0, 1), (3, 1), (0, 2), (1100 - 73, 1)]:
        assert run.push(shard, lane, clock, rows=run.rows(lane % 7, clock))
    error = refusal_of(run.push, shard, 4 + 1024, 1, rows=run.rows(0, 1))
    assert error.refusal == Refusal.INVALID_ARGUMENT


def test_an_earlier_lease_is_refused_and_a_later_one_begins_anew(run):
    shard = run.start()
    run.push(shard, 0, 1)
    run.push(shard, 0, 2)
    assert refusal_of(run.push, shard, 0, 3, lease=2, seq=3).expected_seq == 1
    assert run.push(shard, 0, 1, lease=2, seq=1)  # applied before, under the lease before
    error = refusal_of(run.push, shard, 0, 3)
    assert error.refusal == Refusal.FAILED_PRECONDITION
    assert not error.moved
    assert run.push(shard, 0, 2, lease=2)
    assert run.push(shard, 0, 3, lease=2)
    np.testing.assert_array_equal(run.pull(shard), run.sums([(0, 1), (0, 2), (0, 3)]))
    assert shard.counts.skipped_rows == sum(len(run.rows(0, clock)[0]) for clock in (1, 2))


def test_a_chunk_computed_again_is_applied_where_it_was_not(run):
    """A trainer dies between two frames of a clock: buckets that its frame did not reach take the second's rows."""
    shard = run.start()
    ids, gradients = run.rows(0, 1)
    first = np.isin(buckets_of(ids, salt_of("a")) % 2, 0)
    run.push(shard, 0, 1, rows=(ids[first], gradients[first]))
    other = np.random.default_rng(0).integers(-8, 9, gradients.shape).astype(np.float32)  # with other weights
    run.push(shard, 0, 1, lease=2, rows=(ids, other))
    expected = np.zeros_like(run.pull(shard))
    expected[ids] = -np.where(first[:, None], gradients, other)
    np.testing.assert_array_equal(run.pull(shard), expected)


def test_tables_of_one_clock_have_marks_of_their_own(run):
    shard = run.start()
    for lease in (1, 2):
        answers = run.send(shard, [run.frame(0, 1, lease=lease, seq=t + 1, table=t) for t in (0, 1)])
        assert [answer.header.seq for answer in answers] == [1, 2]
    for table in (0, 1):
        np.testing.assert_array_equal(run.pull(shard, table), run.sums([(0, 1)], table))


def test_a_message_stops_at_the_first_refused_frame(run):
    shard = run.start()
    frames = [run.frame(0, 1), run.frame(0, 3), run.frame(0, 2)]
    assert len(run.send(shard, frames)) == 1
    np.testing.assert_array_equal(run.pull(shard), run.sums([(0, 1)]))


def test_a_wrong_frame_spoils_its_message_before_anything_is_applied(run):
    shard = run.start()
    for wrong in (
        run.frame(0, 2, rows=(np.array([5]), np.zeros((1, 3), np.float32))),
        run.frame(0, 2, table=2, rows=run.rows(0, 2)),
        encode(Header(Op.PULL, run_id=7, dim=4), np.array([5])),
        encode(Header(Op.PUSH, run_id=8, lane=0, lease=1, seq=2, clock=2), *run.rows(0, 2)),
        run.frame(0, 0, seq=2, rows=run.rows(0, 2)),
        run.frame(0, 2, factor=float("nan")),
        encode(Header(Op.PUSH, run_id=7, lane=0, lease=1, seq=2, clock=2, dim=4), np.array([5])),
    ):
        assert refusal_of(run.send, shard, [run.frame(0, 1), wrong]).refusal == Refusal.INVALID_ARGUMENT
    assert refusal_of(run.push, shard, 0, 1, seq=0).refusal == Refusal.INVALID_ARGUMENT
    assert shard.counts.pushes == 0
    assert not run.pull(shard).any()


def test_a_bucket_that_is_elsewhere_or_frozen_refuses_the_whole_frame_and_keeps_its_number(run):
    shard = run.start()
    buckets = buckets_of(run.rows(0, 1)[0], salt_of("a"))
    owners = np.zeros(4096, np.int32)
    owners[buckets[3]] = 1
    run.route(shard, owners, 2)
    error = refusal_of(run.push, shard, 0, 1)
    assert (error.refusal, error.moved, error.expected_seq) == (Refusal.FAILED_PRECONDITION, True, 1)
    run.route(shard, np.zeros(4096, np.int32), 3)
    frozen = np.zeros(4096, bool)
    frozen[buckets[3]] = True
    shard.freeze(frozen)
    error = refusal_of(run.push, shard, 0, 1)
    assert error.refusal == Refusal.UNAVAILABLE
    assert error.retry_after_seconds
    assert not run.pull(shard).any()  # pulls go on
    shard.thaw(frozen)
    assert run.push(shard, 0, 1)
    run.route(shard, owners, 2)  # older than what it knows
    assert run.push(shard, 0, 2)
    run.route(shard, owners, 4)
    assert not run.push(shard, 0, 1)  # duplicates are known wherever their rows have gone
    assert refusal_of(run.pull, shard).moved


def test_nothing_is_answered_before_routes_are_known(run):
    shard = Shard(run.description, 0)
    for call in (lambda: run.push(shard, 0, 1), lambda: run.pull(shard)):
        assert refusal_of(call).refusal == Refusal.UNAVAILABLE


def test_empty_frames_are_pushes_too(run):
    shard = run.start()
    none = (np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
    message = join([encode(Header(Op.PUSH, run_id=7, lane=0, lease=1, seq=1, clock=1, dim=4), none[0])])
    shard.push(message)
    assert shard.versions == [1, 0]
    assert run.pull(shard, ids=none[0]).shape == (0, 4)


def test_staleness_is_counted_in_powers_of_two(run):
    shard = run.start()
    for clock in range(1, 10):
        run.push(shard, 0, clock, version=0 if clock < 9 else 7)
    assert shard.counts.staleness[0, :5].tolist() == [1, 2, 2, 4, 0]
    assert shard.counts.copy().staleness.sum() == 9


def test_answers_say_the_version_and_the_routes(run):
    shard = run.start(epoch=5)
    run.push(shard, 0, 1)
    (answer,) = run.send(shard, [run.frame(0, 2)])
    assert (answer.header.flags, answer.header.version, answer.header.route_epoch) == (Flag.REPLY, 2, 5)


def test_a_large_pull_is_refused(run):
    shard = run.start()
    error = refusal_of(run.pull, shard, ids=np.zeros(600_000, np.int64))
    assert error.refusal == Refusal.INVALID_ARGUMENT


def test_updates_are_the_sum_of_the_lanes_highest_clocks(run):
    shard = run.start()
    given = []
    table = shard._guarded.state.tables[0]
    push = table.push
    table.push = lambda ids, gradients, *, updates, **rest: (
        given.append(updates),
        push(ids, gradients, updates=updates, **rest),
    )
    run.push(shard, 0, 1)
    run.push(shard, 1, 4, seq=1)
    run.push(shard, 0, 2)
    run.push(shard, 1, 5, lease=2, seq=1)
    run.push(shard, 1, 3, lease=3, seq=1, rows=run.rows(2, 9))
    assert given == [1, 5, 6, 7, 7]

"""The coordinator's promises on data: handed out once whoever dies, in lanes that are leased, behind a gate."""

from __future__ import annotations

import random
import threading
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.coordinator.answers import Chunk, Finished, Wait
from parameter_server.coordinator.chunk_queue import MAX_HELD
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.shard.lane_order import CLIENT_LANES


def test_each_chunk_is_completed_once_whoever_dies(run: Any, time: Any, described: RunDescription) -> None:
    rng = random.Random(0)
    members = {run.join(): [] for _ in range(3)}
    completed: list[Chunk] = []
    leases: dict[int, list[int]] = {lane: [] for lane in range(described.lanes)}
    for _ in range(10_000):
        member = rng.choice(list(members))
        held: list[Chunk] = members[member]
        draw = rng.random()
        if draw < 0.05:  # dies
            for _ in range(3):
                for other in members.keys() - {member}:
                    run.heartbeat(other)
                time.seconds += 4
            assert not run.heartbeat(member).known
            del members[member]
            members[run.join()] = []
        elif draw < 0.6:
            answer = run.next_chunk(member)
            if isinstance(answer, Chunk):
                held.append(answer)
                leases[answer.lane].append(answer.lease)
            elif isinstance(answer, Finished):
                break
        elif held:
            chunk = held.pop(0)
            run.complete(member, chunk)
            completed.append(chunk)
    assert sorted(chunk.index for chunk in completed) == list(range(run.status().chunks))
    assert sum(chunk.num_samples for chunk in completed) == described.samples
    assert all(given == sorted(given) for given in leases.values())
    assert run.status().samples_completed == described.samples
    for lane in range(described.lanes):  # in order, within each lane
        indices = [chunk.index for chunk in completed if chunk.lane == lane]
        assert indices == sorted(indices)


def test_the_lane_of_a_dead_trainer_gets_another_lease(run: Any, time: Any, refused: Any) -> None:
    dead = run.join()
    lost = run.take(dead)
    time.seconds = 10.5
    other = run.join()
    again = run.take(other)
    assert again == replace(lost, lease=lost.lease + 1)
    back = run.join()
    refused(Refusal.FAILED_PRECONDITION, "unknown member 1: register again", lambda: run.complete(dead, lost))
    refused(Refusal.FAILED_PRECONDITION, "current lease 2, got 1", lambda: run.complete(back, lost))
    refused(Refusal.FAILED_PRECONDITION, "lane 0", lambda: run.complete(back, again))
    run.complete(other, again)
    run.complete(other, again)  # its answer was lost on the way
    refused(Refusal.INVALID_ARGUMENT, "below 4, got 99", lambda: run.complete_chunk(other, 99, 1, 1))
    refused(Refusal.INVALID_ARGUMENT, "a chunk of lane 0", lambda: run.complete_chunk(other, 0, again.lease, 1))


def test_a_trainer_holds_few_chunks_and_gets_one_whose_answer_was_lost_again(run: Any) -> None:
    member = run.join()
    held = [run.take(member) for _ in range(MAX_HELD)]
    assert [chunk.index for chunk in held] == list(range(MAX_HELD))
    assert isinstance(run.next_chunk(member), Wait)
    assert run.next_chunk(member, [0, 1, 3]) == held[2]
    assert isinstance(run.next_chunk(member, [0, 1, 2, 3]), Wait)


def test_one_lane_is_read_ahead_by_its_holder(described: RunDescription, refused: Any, coordinate: Any) -> None:
    with closing(coordinate(replace(described, lanes=1))) as run:
        run.register("trainer", "a"), run.register("trainer", "b")
        first, second = run.take(1), run.take(1)
        assert (second.index, second.lease, second.first_clock) == (1, first.lease, first.first_clock + 3)
        assert isinstance(run.next_chunk(2), Wait)
        refused(Refusal.FAILED_PRECONDITION, "expected chunk 0 before 1", lambda: run.complete(1, second))
        run.complete(1, first)
        run.complete(1, second)
        assert run.take(2).lease == first.lease + 1


def test_one_trainer_begins_while_others_wait_and_another_takes_its_place_if_it_dies(
    time: Any, described: RunDescription, coordinate: Any
) -> None:
    chunk_samples = described.batch_size * described.chunk_batches
    alone = replace(described, alone_samples=2 * chunk_samples - 1)  # the first two chunks
    with closing(coordinate(alone, clock=time)) as run:
        a, b = run.join(), run.join()
        first, second = run.take(a), run.take(a)
        assert isinstance(run.next_chunk(b), Wait)
        run.complete(a, first)
        assert isinstance(run.next_chunk(b), Wait)
        time.seconds += 1000.0  # a's lease ends
        c, d = run.join(), run.join()
        again = run.take(c)
        assert (again.index, again.lease) == (second.index, second.lease + 1)
        assert isinstance(run.next_chunk(d), Wait)
        run.complete(c, again)
        assert {run.take(d).index, run.take(c).index} == {2, 3}


def test_finished_only_when_all_are_complete(run: Any) -> None:
    a, b = run.join(), run.join()
    held = run.take(b)
    while isinstance(chunk := run.next_chunk(a), Chunk):
        run.complete(a, chunk)
    assert isinstance(chunk, Wait)
    while isinstance(chunk := run.next_chunk(b, [held.index]), Chunk):  # the rest of its lane
        run.complete(b, held)
        held = chunk
    run.complete(b, held)
    assert isinstance(run.next_chunk(a), Finished)


def test_runs_without_data(time: Any, described: RunDescription, coordinate: Any) -> None:
    with closing(coordinate(replace(described, samples=0, epoch_samples=0), clock=time)) as run:
        member = run.register("client", "notebook").member
        assert isinstance(run.next_chunk(member), Finished)
        assert run.client_lane(member) == (4, 1, 1)
        assert run.client_lane(member) == (5, 1, 1)
        run.leave(member, {4: 12})
        second = run.register("client", "notebook").member
        assert run.client_lane(second) == (4, 2, 13)
        assert run.client_lane(second) == (6, 1, 1)  # nobody knows the last clock of lane 5
        time.seconds = 60
        third = run.register("client", "notebook").member
        assert run.client_lane(third).lane == 7


def test_client_lanes_are_bounded(run: Any) -> None:
    member = run.join()
    for _ in range(CLIENT_LANES):
        run.client_lane(member)
    with pytest.raises(RefusedError, match="expected at most 1024 lanes") as refused:
        run.client_lane(member)
    assert refused.value.refusal is Refusal.RESOURCE_EXHAUSTED


def test_the_gate_waits_for_the_slowest_and_not_for_the_dead(run: Any, time: Any, refused: Any) -> None:
    a, b = run.join(), run.join()
    assert run.gate(a, 0)
    assert run.gate(b, 0)
    assert run.gate(a, 1)
    assert not run.gate(a, 2)
    passed = threading.Event()

    def wait() -> None:
        LocalCoordinatorClient(run).gate(a, 2, deadline_seconds=30)
        passed.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not passed.wait(0.1)
    time.seconds = 9
    run.heartbeat(a)
    time.seconds = 11
    run.tick()
    waiting.join(5)
    assert passed.is_set()
    refused(Refusal.FAILED_PRECONDITION, "unknown member", lambda: run.gate(b, 1))


def test_who_waits_for_data_does_not_hold_back_others(run: Any, described: RunDescription) -> None:
    a, b = run.join(), run.join()
    run.gate(a, 0), run.gate(b, 0)
    for _ in range(described.lanes):
        run.take(a)
    assert not run.gate(a, 2)
    assert isinstance(run.next_chunk(b), Wait)
    assert run.gate(a, 2)


def test_a_gate_that_stays_shut_times_out(run: Any) -> None:
    a, b = run.join(), run.join()
    run.gate(b, 0), run.gate(a, 0)
    with pytest.raises(TimeoutError, match="slower trainers to reach batch 5 within 0 s"):
        LocalCoordinatorClient(run).gate(a, 5, deadline_seconds=0)

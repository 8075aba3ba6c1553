"""The coordinator's promises on data: handed out once whoever dies, in lanes that are leased, behind a gate."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from embeddings.tables import TableConfig
from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.coordinator.answers import Chunk, Finished, Wait
from parameter_server.coordinator.chunk_queue import MAX_HELD
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.shard.lane_order import CLIENT_LANES

RUN = RunDescription(
    run_id=7,
    seed=0,
    tables=(TableConfig(name="t", num_rows=10, dim=4, features=("f",)),),
    lanes=4,
    staleness=1,
    samples=200,
    epoch_samples=90,
    batch_size=4,
    chunk_batches=3,
)


def refused(refusal: Refusal, message: str, call: Callable[[], object]) -> None:
    with pytest.raises(RefusedError, match=message) as error:
        call()
    assert error.value.refusal is refusal


def join(run: Coordinator, name: str = "t") -> int:
    return run.register("trainer", name, description_json=RUN.to_json()).member


def take(run: Coordinator, member: int) -> Chunk:
    chunk = run.next_chunk(member)
    assert isinstance(chunk, Chunk)
    return chunk


def complete(run: Coordinator, member: int, chunk: Chunk) -> None:
    run.complete_chunk(member, chunk.lane, chunk.lease, chunk.index)


def test_each_chunk_is_completed_once_whoever_dies(run: Coordinator, time: Any) -> None:
    rng = random.Random(0)
    members = {join(run): [] for _ in range(3)}
    completed: list[Chunk] = []
    leases: dict[int, list[int]] = {lane: [] for lane in range(RUN.lanes)}
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
            members[join(run)] = []
        elif draw < 0.6:
            answer = run.next_chunk(member)
            if isinstance(answer, Chunk):
                held.append(answer)
                leases[answer.lane].append(answer.lease)
            elif isinstance(answer, Finished):
                break
        elif held:
            chunk = held.pop(0)
            complete(run, member, chunk)
            completed.append(chunk)
    assert sorted(chunk.index for chunk in completed) == list(range(run.status().chunks))
    assert sum(chunk.num_samples for chunk in completed) == RUN.samples
    assert all(given == sorted(given) for given in leases.values())
    assert run.status().samples_completed == RUN.samples
    for lane in range(RUN.lanes):  # in order, within each lane
        indices = [chunk.index for chunk in completed if chunk.lane == lane]
        assert indices == sorted(indices)


def test_the_lane_of_a_dead_trainer_gets_another_lease(run: Coordinator, time: Any) -> None:
    dead = join(run)
    lost = take(run, dead)
    time.seconds = 10.5
    other = join(run)
    again = take(run, other)
    assert again == replace(lost, lease=lost.lease + 1)
    back = join(run)
    refused(Refusal.FAILED_PRECONDITION, "unknown member 1: register again", lambda: complete(run, dead, lost))
    refused(Refusal.FAILED_PRECONDITION, "current lease 2, got 1", lambda: complete(run, back, lost))
    refused(Refusal.FAILED_PRECONDITION, "lane 0", lambda: complete(run, back, again))
    complete(run, other, again)
    complete(run, other, again)  # its answer was lost on the way
    refused(Refusal.INVALID_ARGUMENT, "below 4, got 99", lambda: run.complete_chunk(other, 99, 1, 1))
    refused(Refusal.INVALID_ARGUMENT, "a chunk of lane 0", lambda: run.complete_chunk(other, 0, again.lease, 1))


def test_a_trainer_holds_few_chunks_and_gets_one_whose_answer_was_lost_again(run: Coordinator) -> None:
    member = join(run)
    held = [take(run, member) for _ in range(MAX_HELD)]
    assert [chunk.index for chunk in held] == list(range(MAX_HELD))
    assert isinstance(run.next_chunk(member), Wait)
    assert run.next_chunk(member, [0, 1, 3]) == held[2]
    assert isinstance(run.next_chunk(member, [0, 1, 2, 3]), Wait)


def test_one_lane_is_read_ahead_by_its_holder() -> None:
    with closing(Coordinator(replace(RUN, lanes=1))) as run:
        run.register("trainer", "a"), run.register("trainer", "b")
        first, second = take(run, 1), take(run, 1)
        assert (second.index, second.lease, second.first_clock) == (1, first.lease, first.first_clock + 3)
        assert isinstance(run.next_chunk(2), Wait)
        refused(Refusal.FAILED_PRECONDITION, "expected chunk 0 before 1", lambda: complete(run, 1, second))
        complete(run, 1, first)
        complete(run, 1, second)
        assert take(run, 2).lease == first.lease + 1


def test_finished_only_when_all_are_complete(run: Coordinator) -> None:
    a, b = join(run), join(run)
    held = take(run, b)
    while isinstance(chunk := run.next_chunk(a), Chunk):
        complete(run, a, chunk)
    assert isinstance(chunk, Wait)
    while isinstance(chunk := run.next_chunk(b, [held.index]), Chunk):  # the rest of its lane
        complete(run, b, held)
        held = chunk
    complete(run, b, held)
    assert isinstance(run.next_chunk(a), Finished)


def test_runs_without_data(time: Any) -> None:
    with closing(Coordinator(replace(RUN, samples=0, epoch_samples=0), clock=time)) as run:
        member = run.register("client", "notebook").member
        assert isinstance(run.next_chunk(member), Finished)
        assert run.client_lane(member) == (4, 1, 1)
        assert run.client_lane(member) == (5, 1, 1)
        run.progress(member, 4, 1, 12)
        run.leave(member, {4: 12})
        second = run.register("client", "notebook").member
        assert run.client_lane(second) == (4, 2, 13)
        assert run.client_lane(second) == (6, 1, 1)  # nobody knows the last clock of lane 5
        refused(Refusal.FAILED_PRECONDITION, "lane 4", lambda: run.progress(second, 4, 1, 14))
        time.seconds = 60
        third = run.register("client", "notebook").member
        assert run.client_lane(third).lane == 7


def test_client_lanes_are_bounded(run: Coordinator) -> None:
    member = join(run)
    for _ in range(CLIENT_LANES):
        run.client_lane(member)
    refused(Refusal.RESOURCE_EXHAUSTED, "expected at most 1024 lanes", lambda: run.client_lane(member))


def test_the_gate_waits_for_the_slowest_and_not_for_the_dead(run: Coordinator, time: Any) -> None:
    a, b = join(run), join(run)
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


def test_who_waits_for_data_does_not_hold_back_others(run: Coordinator) -> None:
    a, b = join(run), join(run)
    run.gate(a, 0), run.gate(b, 0)
    for _ in range(RUN.lanes):
        take(run, a)
    assert not run.gate(a, 2)
    assert isinstance(run.next_chunk(b), Wait)
    assert run.gate(a, 2)


def test_a_gate_that_stays_shut_times_out(run: Coordinator) -> None:
    a, b = join(run), join(run)
    run.gate(b, 0), run.gate(a, 0)
    with pytest.raises(TimeoutError, match="slower trainers to reach batch 5 within 0 s"):
        LocalCoordinatorClient(run).gate(a, 5, deadline_seconds=0)

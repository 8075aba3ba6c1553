"""A trainer's heartbeats go on while the coordinator is away or ends, and what stops them stops the trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from dlrm.asynchronous.crew import FINAL
from dlrm.asynchronous.membership import LeaseLostError, Membership
from dlrm.cli import status_of
from embeddings import TableConfig
from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.coordinator.answers import Beat, Chunk
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError

RUN = RunDescription(run_id=1, seed=0, tables=(TableConfig(name="a", num_rows=10, dim=4),), samples=10, batch_size=5)


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    with closing(Coordinator(RUN, lease_seconds=0.2)) as coordinator:
        yield coordinator


def until_raised(check: Callable[[], None]) -> Exception:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            check()
        except Exception as error:
            return error
        time.sleep(0.01)
    raise AssertionError("it did not come to that in time")


def beats(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> list[Any]:
    """Has heartbeats answered by a list, and then as ever; returns what is left of it."""
    real = coordinator.heartbeat

    def heartbeat(member: int, facts: Any = None) -> Beat:
        if answers and isinstance(error := answers.pop(), Exception):
            raise error
        return real(member, facts)

    monkeypatch.setattr(coordinator, "heartbeat", heartbeat)
    return answers


def test_a_coordinator_that_ends_is_one_that_comes_back(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = RefusedError(Refusal.UNAVAILABLE, "the coordinator ends")
    left = beats(coordinator, monkeypatch, [ending, ending])
    with Membership(LocalCoordinatorClient(coordinator), "t", RUN) as membership:
        end = time.monotonic() + 10
        while left and time.monotonic() < end:
            time.sleep(0.01)
        assert not left
        (before,) = coordinator.status().members
        while coordinator.status().members[0].seconds_since_heard >= before.seconds_since_heard:
            assert time.monotonic() < end, "no heartbeat came after the coordinator was back"
        membership.check()


def test_what_ends_the_heartbeats_ends_the_trainer(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    beats(coordinator, monkeypatch, [KeyError("a fault of the program")])
    with Membership(LocalCoordinatorClient(coordinator), "t", RUN) as membership:
        assert "a fault of the program" in str(until_raised(membership.check))
        with pytest.raises(KeyError):
            membership.next_chunk()


def test_a_trainer_that_was_given_up_hears_of_it(coordinator: Coordinator) -> None:
    with Membership(LocalCoordinatorClient(coordinator), "t", RUN) as membership:
        coordinator.leave(membership.member)
        error = until_raised(membership.check)
    assert isinstance(error, LeaseLostError)
    assert "start it again" in str(error)
    assert status_of(error) not in FINAL  # or a crew would not start it again


def test_a_trainer_that_hears_of_it_before_its_heartbeats_may_start_again_too() -> None:
    with (
        closing(Coordinator(RUN, lease_seconds=3600)) as coordinator,
        Membership(LocalCoordinatorClient(coordinator), "t", RUN) as membership,
    ):
        chunk = membership.next_chunk()
        assert isinstance(chunk, Chunk)
        coordinator.leave(membership.member)
        for ask in (membership.next_chunk, lambda: membership.complete_chunk(chunk), lambda: membership.pass_gate(1)):
            with pytest.raises(LeaseLostError, match="start it again"):
                ask()

"""The gate holds back who is ahead, and nobody who is dead, late or without data holds back others."""

from __future__ import annotations

import pytest

from parameter_server.coordinator.gate import Gate


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_nobody_is_further_ahead_than_allowed(staleness: int) -> None:
    gate = Gate(staleness)
    gate.enter(1, 0)
    gate.enter(2, 0)
    for clock in range(staleness + 1):
        gate.enter(1, clock)
        assert gate.is_open(1)
    gate.enter(1, staleness + 1)
    assert not gate.is_open(1)
    assert gate.is_open(2)
    gate.enter(2, 1)
    assert gate.is_open(1)


def test_without_a_bound_it_is_open() -> None:
    gate = Gate(None)
    gate.enter(1, 0)
    gate.enter(2, 10**6)
    assert gate.is_open(2)


def test_the_dead_and_those_without_data_do_not_count() -> None:
    gate = Gate(0)
    for member in (1, 2, 3):
        gate.enter(member, 0)
    gate.enter(1, 1)
    assert not gate.is_open(1)
    gate.leave(2)
    assert not gate.is_open(1)
    gate.pause(3)
    assert gate.is_open(1)
    gate.enter(1, 5)
    gate.enter(3, 0)  # has data again, level with the slowest that works
    gate.enter(1, 6)
    assert not gate.is_open(1)
    gate.enter(3, 1)
    assert gate.is_open(1)


def test_who_joins_late_starts_level_with_the_slowest() -> None:
    gate = Gate(1)
    gate.enter(1, 100)
    gate.enter(2, 100)
    gate.enter(1, 101)
    gate.enter(3, 7)  # its own count, at the place of 2
    assert gate.is_open(1)
    gate.enter(2, 101)
    gate.enter(1, 102)
    assert not gate.is_open(1)
    gate.enter(3, 8)
    assert gate.is_open(1)


def test_old_messages_do_not_set_back() -> None:
    gate = Gate(0)
    gate.enter(1, 0)
    gate.enter(2, 0)
    gate.enter(2, 1)
    gate.enter(2, 0)
    gate.enter(1, 1)
    assert gate.is_open(1)

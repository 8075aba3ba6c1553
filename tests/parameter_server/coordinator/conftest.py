"""What tests of the coordinator share: one whose clock stands still until they set it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from parameter_server.coordinator.coordinator import Coordinator


class Time:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def time() -> Time:
    """What coordinators take for the time."""
    return Time()


@pytest.fixture
def run(request: pytest.FixtureRequest, time: Time) -> Iterator[Coordinator]:
    """A coordinator of the run that a file of tests calls ``RUN``."""
    with closing(Coordinator(request.module.RUN, lease_seconds=10, clock=time)) as coordinator:
        yield coordinator

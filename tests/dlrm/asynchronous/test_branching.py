"""A run that begins with another one's weights gets them once: a second load would take away what was pushed since."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from dlrm.asynchronous import branching
from dlrm.asynchronous.branching import brings_weights
from dlrm.asynchronous.membership import Membership
from embeddings import TableConfig
from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.coordinator.answers import Chunk
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.description import RunDescription

RUN = RunDescription(run_id=1, seed=0, tables=(TableConfig(name="a", num_rows=10, dim=4),), samples=10, batch_size=5)


@pytest.fixture
def client() -> Iterator[LocalCoordinatorClient]:
    with closing(Coordinator(RUN, lease_seconds=3600)) as coordinator:
        yield LocalCoordinatorClient(coordinator)


def test_one_loads_and_the_others_wait_until_data_are_given_out(
    client: LocalCoordinatorClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branching, "LOOK_SECONDS", 0.01)
    with Membership(client, "first", RUN) as first, Membership(client, "second", RUN) as second:
        assert brings_weights(first)
        said: list[bool] = []
        waiting = threading.Thread(target=lambda: said.append(brings_weights(second)))
        waiting.start()
        waiting.join(0.1)
        assert not said
        assert isinstance(first.next_chunk(), Chunk)
        waiting.join(20)
        assert said == [False]


def test_another_loads_where_the_first_dies_before_it_has_begun_and_nobody_does_later(
    client: LocalCoordinatorClient,
) -> None:
    with Membership(client, "first", RUN) as first:
        assert brings_weights(first)
    with Membership(client, "second", RUN) as second:
        assert brings_weights(second)
        assert isinstance(second.next_chunk(), Chunk)
    with Membership(client, "third", RUN) as third:  # though no chunk is complete
        assert not brings_weights(third)

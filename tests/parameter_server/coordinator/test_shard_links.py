"""The coordinator keeps one connection to each shard that lives, and none to the ports of those that have ended."""

from __future__ import annotations

from contextlib import closing

from embeddings.tables import TableConfig
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.coordinator.moves import ShardKeeper
from parameter_server.description import RunDescription
from parameter_server.partition import Routes

RUN = RunDescription(run_id=1, seed=0, tables=(TableConfig(name="t", num_rows=10, dim=2),))


class Link:
    """A connection that says when it is closed."""

    def __init__(self, address: str, closed: list[str]) -> None:
        self._address, self._closed = address, closed

    def settle(self, order: int, routes: Routes) -> None:
        pass

    def close(self) -> None:
        self._closed.append(self._address)


def test_connections_to_shards_that_were_started_again_are_closed() -> None:
    opened: list[str] = []
    closed: list[str] = []

    def connect(address: str) -> Link:
        opened.append(address)
        return Link(address, closed)

    with closing(Coordinator(RUN)) as run, closing(ShardKeeper(run, connect)) as keeper:  # type: ignore[arg-type]
        for port in (1, 2, 3):
            run.register("shard", "a", f"local:{port}")
            keeper.step()
            keeper.step()
        assert opened == ["local:1", "local:2", "local:3"]
        assert closed == ["local:1", "local:2"]
    assert closed == opened

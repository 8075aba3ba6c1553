"""What a scrape tells is what the members have counted, and the dashboard asks for nothing else."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from embeddings.tables import TableConfig
from parameter_server.coordinator.answers import MemberStatus, Status
from parameter_server.description import RunDescription
from parameter_server.processes.call_meter import CallMeter
from parameter_server.processes.endpoint import Endpoint
from parameter_server.processes.telemetry import MetricsServer, RunMetrics, ShardMetrics
from parameter_server.security.security import ClientSecurity, ServerSecurity
from parameter_server.shard.counts import STALENESS_BINS, ShardCounts

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana" / "parameter_server.json"
TABLES = tuple(TableConfig(name=name, num_rows=10, dim=4, features=(name,)) for name in ("site", "user"))


@dataclass
class FakeShard:
    description: RunDescription = field(default_factory=lambda: RunDescription(run_id=1, seed=0, tables=TABLES))
    counts: ShardCounts = field(
        default_factory=lambda: ShardCounts(staleness=np.zeros((2, STALENESS_BINS), np.int64), pulls=3, pushed_rows=70)
    )
    num_rows: tuple[int, ...] = (5, 7)
    num_bytes: int = 4096


@dataclass
class FakeRun:
    snapshot_age: float | None = None

    def status(self) -> Status:
        trainer = MemberStatus(member=1, role="trainer", name="a", address="", alive=True, seconds_since_heard=0.1)
        plain = dict.fromkeys(("run_id", "route_epoch", "chunks", "chunks_completed", "chunks_out", "samples"), 3)
        plain |= dict.fromkeys(("samples_completed", "rows", "row_bytes", "lost_pushes", "moves_done"), 2)
        return Status(
            **plain,
            members=(trainer,),
            snapshots=(),
            snapshot_age_seconds=self.snapshot_age,
            moving_buckets=0,
            longest_freeze_seconds=0.25,
            expired_leases=4,
        )


def scrape(metrics: ShardMetrics | RunMetrics) -> dict[str, float]:
    """Gives each sample by its name and labels."""
    registry = CollectorRegistry()
    registry.register(metrics)
    return read(generate_latest(registry).decode())


def read(text: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


@pytest.fixture
def meter() -> Iterator[CallMeter]:
    """A meter around a server that has answered `/test/Echo` twice, and failed and refused once."""
    meter = CallMeter()
    endpoint = Endpoint(ServerSecurity(token="x" * 16), interceptors=[meter])

    def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
        if request == b"bad":
            raise KeyError(request)
        return request

    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    endpoint.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    address = endpoint.listen("localhost:0")
    endpoint.start()
    for token, request in (("x" * 16, b"a"), ("x" * 16, b"b"), ("x" * 16, b"bad"), ("y" * 16, b"a")):
        with ClientSecurity(token=token).open_channel(address) as channel:
            future = channel.unary_unary("/test/Echo").future(request, timeout=5)
            assert future.exception() is None or request == b"bad" or token[0] == "y"
    yield meter
    endpoint.stop(0.0)


def test_a_scrape_of_a_shard_tells_its_counts(meter: CallMeter) -> None:
    shard = FakeShard()
    for pulled in (10, 9, 8, 6):  # at version 10: 0, 1, 2 and 4 others since
        shard.counts.count_staleness(1, 10, pulled)
    told = scrape(ShardMetrics(meter, shard))
    assert told["recforge_shard_pulls_total"] == 3
    assert told["recforge_shard_pushed_rows_total"] == 70
    assert told['recforge_shard_rows{table="user"}'] == 7
    assert told["recforge_shard_row_bytes"] == 4096
    staleness = {
        bound: told[f'recforge_shard_staleness_bucket{{le="{bound}",table="user"}}']
        for bound in ("0", "1", "3", "7", "+Inf")
    }
    assert list(staleness.values()) == [1, 2, 3, 4, 4]
    assert told['recforge_shard_staleness_bucket{le="+Inf",table="site"}'] == 0
    shard.counts.pulls = 4
    assert scrape(ShardMetrics(meter, shard))["recforge_shard_pulls_total"] == 4


def test_calls_are_counted_by_what_became_of_them(meter: CallMeter) -> None:
    told = scrape(ShardMetrics(meter, FakeShard()))
    ended = {
        status: told.get(f'recforge_calls_total{{method="Echo",status="{status}"}}', 0)
        for status in ("OK", "UNKNOWN", "UNAUTHENTICATED")
    }
    assert ended == {"OK": 2, "UNKNOWN": 1, "UNAUTHENTICATED": 1}
    assert told['recforge_calls_in_flight{method="Echo"}'] == 0
    assert told['recforge_call_seconds_count{method="Echo"}'] == 4
    assert 0 < told['recforge_call_seconds_sum{method="Echo"}'] < 10


def test_a_shard_that_waits_for_its_run_tells_its_calls_alone(meter: CallMeter) -> None:
    told = scrape(ShardMetrics(meter))
    assert told['recforge_call_seconds_count{method="Echo"}'] == 4
    assert not any(name.startswith("recforge_shard") for name in told)


def test_a_scrape_of_a_run_tells_its_status() -> None:
    told = scrape(RunMetrics(FakeRun(), CallMeter()))
    assert told["recforge_run_samples_completed"] == 2
    assert told["recforge_run_expired_leases_total"] == 4
    assert told['recforge_run_members{role="trainer"}'] == 1
    assert told['recforge_run_members{role="shard"}'] == 0
    assert "recforge_run_snapshot_age_seconds" not in told  # there was none


def test_metrics_are_told_over_http() -> None:
    with (
        MetricsServer(RunMetrics(FakeRun(), CallMeter()), "127.0.0.1", 0) as server,
        closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)) as connection,
    ):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    assert read(text) == scrape(RunMetrics(FakeRun(), CallMeter()))


def test_a_port_in_use_is_one_line() -> None:
    metrics = RunMetrics(FakeRun(), CallMeter())
    with (
        MetricsServer(metrics, "127.0.0.1", 0) as server,
        pytest.raises(OSError, match="the port is in use") as refused,
    ):
        MetricsServer(metrics, "127.0.0.1", server.port)
    assert f"--metrics-port {server.port}: " in str(refused.value)


def test_every_metric_of_the_dashboard_is_in_a_scrape(meter: CallMeter) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked = {name for expression in expressions for name in re.findall(r"\brecforge_\w+", expression)}
    scraped = {**scrape(ShardMetrics(meter, FakeShard())), **scrape(RunMetrics(FakeRun(5.0), meter))}
    told = {name.partition("{")[0] for name in scraped}
    assert len(asked) > 20
    assert asked <= told, f"the dashboard asks for {sorted(asked - told)}, which nobody tells"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["targets"] for panel in panels if panel["type"] != "row")

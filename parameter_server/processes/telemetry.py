"""Prometheus metrics of a shard and of the coordinator: read when they are asked for, so that calls pay nothing."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from parameter_server.processes.call_meter import LATENCY_BOUNDS, CallMeter

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from parameter_server.coordinator.answers import Status
    from parameter_server.description import RunDescription
    from parameter_server.shard.counts import ShardCounts

_SHARD_COUNTERS = {
    "pulls": "Frames of ids answered",
    "pulled_rows": "Rows of those",
    "pulled_bytes": "Bytes of the answers",
    "pushes": "Frames of gradients applied",
    "pushed_rows": "Rows of those",
    "pushed_bytes": "Bytes of those",
    "skipped_rows": "Rows of pushes that had been applied before, under another lease",
    "duplicates": "Frames of gradients that came again, and were not applied again",
    "refused": "Well-formed messages of gradients of which something was refused",
    "dense_calls": "Exchanges of pieces of the dense part",
    "evicted_rows": "Rows that went by age, by number, or for want of room",
    "journal_bytes": "Bytes appended to the journal",
    "journal_syncs": "How often the journal was synced to the disk",
    "journal_sync_seconds": "Seconds that took",
    "snapshots": "Snapshots taken",
    "lock_seconds": "Seconds for which pulls and pushes had the shard to themselves",
}
_SHARD_GAUGES = {
    "lost_pushes": "Pushes acknowledged since the run began that a crash took",
    "replayed": "Records of the journal that were applied at the start",
    "snapshot_seconds": "Seconds that the last snapshot took",
    "snapshot_pause_seconds": "Longest time that the last snapshot kept pushes waiting at a stretch",
    "longest_pause_seconds": "The same of all snapshots",
}
_RUN_GAUGES = {
    "samples": "Samples of the whole run",
    "samples_completed": "Of those, trained and acknowledged",
    "chunks": "Chunks of data of the whole run",
    "chunks_completed": "Of those, trained and acknowledged",
    "chunks_out": "Of those, held by trainers",
    "rows": "Rows on all shards",
    "row_bytes": "Bytes of those",
    "lost_pushes": "Pushes acknowledged since the run began that crashes took",
    "route_epoch": "Grows with each change of who holds which rows",
    "moving_buckets": "Buckets on their way to another shard",
    "longest_freeze_seconds": "Longest time for which buckets on the move took no pushes",
}
_RUN_COUNTERS = {
    "moves_done": "Moves of buckets from one shard to another",
    "expired_leases": "Members that were silent for too long",
}


class ShardFacts(Protocol):
    """What metrics need of a shard."""

    description: RunDescription
    counts: ShardCounts

    @property
    def num_rows(self) -> Sequence[int]:
        """Of each table."""

    @property
    def num_bytes(self) -> int:
        """Of all tables."""


class RunFacts(Protocol):
    """What metrics need of the coordinator."""

    def status(self) -> Status:
        """Gives the run as it is now."""


class ShardMetrics:
    """Metrics of a shard, for a registry of Prometheus's.

    Args:
        calls: Of its server.
        shard: Whose counts are copied at each scrape.

    Attributes:
        shard: As long as it is None, only calls are told.
    """

    def __init__(self, calls: CallMeter, shard: ShardFacts | None = None) -> None:
        self._calls = calls
        self.shard = shard

    def collect(self) -> Iterator[Metric]:
        """Reads everything once."""
        if (shard := self.shard) is not None:
            yield from _shard_metrics(shard)
        yield from call_metrics(self._calls)


def _shard_metrics(shard: ShardFacts) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    counts = shard.counts.copy()
    for name, text in _SHARD_COUNTERS.items():
        yield CounterMetricFamily(f"recforge_shard_{name}", text, value=getattr(counts, name))
    for name, text in _SHARD_GAUGES.items():
        yield GaugeMetricFamily(f"recforge_shard_{name}", text, value=getattr(counts, name))
    yield GaugeMetricFamily("recforge_shard_row_bytes", "Bytes of rows in memory", value=shard.num_bytes)
    rows = GaugeMetricFamily("recforge_shard_rows", "Rows held", labels=["table"])
    staleness = HistogramMetricFamily(
        "recforge_shard_staleness",
        "Other pushes that a table had seen between a gradient's pull and its push",
        labels=["table"],
    )
    for table, held, bins in zip(shard.description.tables, shard.num_rows, counts.staleness, strict=True):
        rows.add_metric([table.name], held)
        bounds = [float(2**i - 1) for i in range(len(bins) - 1)]
        staleness.add_metric([table.name], _cumulate(bounds, bins.tolist()), None)
    yield rows
    yield staleness


class RunMetrics:
    """Metrics of a whole run, as its coordinator knows it."""

    def __init__(self, run: RunFacts, calls: CallMeter) -> None:
        self._run = run
        self._calls = calls

    def collect(self) -> Iterator[Metric]:
        """Reads everything once."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self._run.status()
        for name, text in _RUN_GAUGES.items():
            yield GaugeMetricFamily(f"recforge_run_{name}", text, value=getattr(status, name))
        for name, text in _RUN_COUNTERS.items():
            yield CounterMetricFamily(f"recforge_run_{name}", text, value=getattr(status, name))
        age = GaugeMetricFamily("recforge_run_snapshot_age_seconds", "Seconds since the last snapshot began")
        if status.snapshot_age_seconds is not None:
            age.add_metric([], status.snapshot_age_seconds)
        yield age
        members = GaugeMetricFamily("recforge_run_members", "Members whose lease is alive", labels=["role"])
        for role in ("trainer", "shard", "client"):
            members.add_metric([role], sum(member.alive and member.role == role for member in status.members))
        yield members
        yield from call_metrics(self._calls)


def call_metrics(meter: CallMeter) -> Iterator[Metric]:
    """Reads a server's calls."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    calls = meter.copy()
    ended = CounterMetricFamily(
        "recforge_calls", "Calls that have ended, by gRPC's status", labels=["method", "status"]
    )
    for (method, status), count in calls.ended.items():
        ended.add_metric([method, status], count)
    yield ended
    waiting = GaugeMetricFamily("recforge_calls_in_flight", "Calls worked on, or waiting for it", labels=["method"])
    for method, count in calls.in_flight.items():
        waiting.add_metric([method], count)
    yield waiting
    seconds = HistogramMetricFamily("recforge_call_seconds", "Seconds from a call's arrival on", labels=["method"])
    for method, counts in calls.latencies.items():
        seconds.add_metric([method], _cumulate(LATENCY_BOUNDS, counts), calls.seconds[method])
    yield seconds


class MetricsServer:
    """Answers Prometheus over HTTP as long as it is open.

    Args:
        metrics: To be read at each scrape.
        host: Where; the metrics are not guarded.
        port: 0 for any free one.

    Attributes:
        port: The one that was taken.

    Raises:
        OSError: The port is in use.
        ValueError: Prometheus's client is not installed.
    """

    def __init__(self, metrics: ShardMetrics | RunMetrics, host: str, port: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ModuleNotFoundError:
            raise ValueError("prometheus_client is not installed; run: pip install 'recforge[ps]'") from None
        registry = CollectorRegistry()
        registry.register(metrics)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            why = "the port is in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error)).lower()
            raise OSError(f"--metrics-port {port}: {why} on {host}; choose another one, or 0 for none") from error
        self.port = int(self._server.server_port)

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _cumulate(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Turns counts per bin, the last one open, into Prometheus's: of all up to a bound."""
    total, buckets = 0, []
    for bound, count in zip([*(f"{bound:.10g}" for bound in bounds), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets

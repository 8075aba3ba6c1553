"""A shard as a process: registered with its coordinator, heard of by heartbeats, and its rows seen after."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from embeddings.allocation import FreeMemory, keep_freed_memory, share_free_memory
from parameter_server.description import RunDescription
from parameter_server.folder_lock import lock_folder
from parameter_server.processes.config import ShardConfig
from parameter_server.processes.stop_signal import StopSignal
from parameter_server.security.security import import_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.processes.logs import EventFormatter
    from parameter_server.processes.shard_membership import ShardMembership
    from parameter_server.shard.shard import Shard

_LOOK_SECONDS = 5.0
_LOG = logging.getLogger(__name__)


def serve(config: ShardConfig, events: EventFormatter) -> None:
    """Is a shard of a run until it is drained, or somebody asks it to end.

    Raises:
        ValueError: The coordinator refuses it, or its folder is another's; see also ``ServerSecurity``.
        OSError: The address or the port of metrics are in use, the coordinator is not reached in time, or nothing can
            be kept any more, as on a full disk.
    """
    import_grpc()
    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.control.shard_service import SHARD_SERVICE, ShardControlService
    from parameter_server.feed.service import MAX_READERS, add_feed_to
    from parameter_server.processes.call_meter import CallMeter
    from parameter_server.processes.endpoint import Endpoint
    from parameter_server.processes.rows_service import add_rows_service
    from parameter_server.processes.shard_membership import ShardMembership, await_description
    from parameter_server.processes.telemetry import MetricsServer, ShardMetrics
    from parameter_server.processes.warm_up import warm_up
    from parameter_server.transports import SERVICE

    share_free_memory()
    keep_freed_memory()  # a pull's or push's arrays are as large as those of the one before
    with StopSignal(at_once=True) as stop, ExitStack() as stack:
        if config.folder is not None:
            lock_folder(config.folder, flag="--folder").release()  # by the shard itself later: fails early
        meter = CallMeter()
        endpoint = Endpoint(config.server_security, config.limits, interceptors=[meter], streams=MAX_READERS)
        address = config.tell(endpoint.listen(config.address))
        stack.callback(endpoint.stop)
        metrics = ShardMetrics(meter)
        if config.metrics_port:
            stack.enter_context(MetricsServer(metrics, config.metrics_host, config.metrics_port))
        client = GrpcCoordinatorClient(
            config.coordinator, config.client_security, deadline_seconds=config.connect_seconds
        )
        stack.enter_context(closing(client))
        description = await_description(client)
        events.run = description.run_id
        check_folder(config, description)
        warm_up(description)
        membership = stack.enter_context(ShardMembership(client, config.called, address))
        check_rows(config, description, membership, client)
        shard = stack.enter_context(closing(open_shard(config, description, membership.number)))
        if config.restore_from:
            restore(shard, config, client)
        add_rows_service(endpoint.server, shard, config.limits)
        add_feed_to(endpoint.server, shard)
        control = stack.enter_context(closing(ShardControlService(shard, config.client_security)))
        control.add_to(endpoint.server)
        metrics.shard = shard
        stack.callback(setattr, metrics, "shard", None)  # before it is closed
        membership.follow(shard)
        endpoint.start([SERVICE, SHARD_SERVICE])
        stop.at_once = False
        endpoint.set_serving(True)
        events.tell_ready(address)
        _keep(shard, membership, config.eviction_seconds, stop)
        endpoint.stop()
        _save(shard)


def check_rows(
    config: ShardConfig, description: RunDescription, membership: ShardMembership, client: GrpcCoordinatorClient
) -> None:
    """Checks that a shard which has held rows does not come with a new folder: they would be born again, silently.

    Raises:
        ValueError: It does.
    """
    from parameter_server.shard.folder import DESCRIPTION

    if description.durability == "none" or config.folder is None or (config.folder / DESCRIPTION).exists():
        return
    if membership.held_buckets and not config.restore_from and client.status().samples_completed:
        raise ValueError(
            f"--folder {config.folder}: expected the folder of {config.called}, which has held rows of this run, got a "
            "new one; give that folder, or another --name to a shard that joins"
        )


def open_shard(config: ShardConfig, description: RunDescription, number: int) -> Shard:
    """Makes the engine, with what is in its folder, and tells people what was lost, cut off or passed over."""
    from parameter_server.shard.shard import Shard

    shard = Shard(description, number, folder=config.folder, journal_sync=config.journal_sync)
    _tell(shard.lines)
    return shard


def restore(shard: Shard, config: ShardConfig, client: GrpcCoordinatorClient) -> None:
    """Takes a new shard's share of rows out of folders of shards that have ended, unless it has done so before.

    Raises:
        ValueError: A folder is in use, or of another run; or the run has other shards that hold rows.
        TimeoutError: Other new shards have not come in time.
    """
    if any(shard.versions):
        _LOG.info("has rows already, and restores none", extra={"event": "restored"})
        return
    for folder in config.restore_from:
        check_ended(folder)
    mine = client.routes(deadline_seconds=config.connect_seconds).owned_by(shard.number)
    if not mine.any():
        raise ValueError(
            "--restore-from: expected a run whose shards have been forgotten, got one in which others hold all rows; "
            "start its coordinator with --forget-shards"
        )
    info = shard.restore_from(config.restore_from, mine)
    _tell(info.lines)
    _LOG.info("restored %d rows", info.rows, extra={"event": "restored", "rows": info.rows, "lost": info.lost})


def check_ended(folder: Path) -> None:
    """Checks that a folder is there, and that no shard uses it.

    Raises:
        ValueError: It is not as that.
    """
    if not folder.is_dir():
        raise ValueError(f"--restore-from {folder}: expected the folder of a shard, got none")
    lock_folder(folder, flag="--restore-from", seconds=_LOOK_SECONDS).release()  # others look as well


def check_folder(config: ShardConfig, description: RunDescription) -> None:
    """Checks that there is a place for what the run wants kept.

    Raises:
        ValueError: There is none.
    """
    if description.durability != "none" and config.folder is None:
        raise ValueError(
            f"--folder: expected one, as the run's durability is {description.durability}, got none; give --folder, or "
            "start the run with --servers.durability none"
        )


def _keep(shard: Shard, membership: ShardMembership, eviction_seconds: float, stop: StopSignal) -> None:
    """Evicts rows now and then, until the process may or must end.

    Raises:
        OSError: The shard cannot keep what it is given.
        ValueError: The coordinator does not take the shard back.
    """
    last, free_memory = time.monotonic(), FreeMemory()
    while not stop.wait():
        if shard.failed is not None:
            raise OSError(f"shard {shard.number}: {shard.failed}; what was acknowledged is still in its folder")
        membership.check()
        if membership.may_end:
            _LOG.info("ends, as it has been drained", extra={"event": "drained"})
            return
        if time.monotonic() - last >= eviction_seconds:
            shard.evict()
            last = time.monotonic()
        free_memory.tend()
    _LOG.info("ends, as it was asked to", extra={"event": "stopping"})


def _tell(lines: Sequence[str]) -> None:
    for line in lines:
        _LOG.warning("%s", line, extra={"event": "restored"})


def _save(shard: Shard) -> None:
    if shard.description.durability != "none":
        saved = shard.snapshot()
        _LOG.info("saved in %.1f s", saved.seconds, extra={"event": "saved", "bytes": saved.bytes})

"""The coordinator as a process: its state, its server, its metrics, and a snapshot of the run now and then."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from parameter_server.errors import Refusal, RefusedError
from parameter_server.folder_lock import lock_folder
from parameter_server.processes.config import CoordinatorConfig
from parameter_server.processes.stop_signal import StopSignal
from parameter_server.security.security import import_grpc

if TYPE_CHECKING:
    from parameter_server.control.coordinator_client import TakesSnapshots
    from parameter_server.coordinator.coordinator import Coordinator
    from parameter_server.processes.logs import EventFormatter

STATE = "coordinator.sqlite"
_RESTORE_SECONDS = 0.1
_LOG = logging.getLogger(__name__)


def serve(config: CoordinatorConfig, events: EventFormatter) -> None:
    """Is the coordinator of a run until somebody asks it to end.

    Raises:
        ValueError: The folder is another process's, or holds another run or release; see also ``ServerSecurity``.
        OSError: The address or the port of metrics are in use, or the disk is full.
    """
    import_grpc()
    from parameter_server.control.coordinator_service import SERVICE, CoordinatorService
    from parameter_server.control.shard_service import GrpcShardLink
    from parameter_server.coordinator.coordinator import Coordinator
    from parameter_server.coordinator.moves import ShardKeeper
    from parameter_server.processes.call_meter import CallMeter
    from parameter_server.processes.endpoint import Endpoint
    from parameter_server.processes.telemetry import MetricsServer, RunMetrics

    with StopSignal(at_once=True) as stop, ExitStack() as stack:
        stack.callback(lock_folder(config.folder, flag="--folder").release)
        meter = CallMeter()
        endpoint = Endpoint(config.server_security, config.limits, interceptors=[meter])
        endpoint.listen(config.address)
        stack.callback(endpoint.stop)
        coordinator = stack.enter_context(
            closing(
                Coordinator(path=config.folder / STATE, start_shards=config.shards, lease_seconds=config.lease_seconds)
            )
        )
        if config.forget_shards:
            coordinator.forget_shards(config.forget_shards)
        keeper = ShardKeeper(coordinator, lambda address: GrpcShardLink(address, config.client_security))
        keeper.start()
        stack.callback(keeper.close)
        CoordinatorService(coordinator, keeper).add_to(endpoint.server)
        if config.metrics_port:
            metrics = RunMetrics(coordinator, meter)
            stack.enter_context(MetricsServer(metrics, config.metrics_host, config.metrics_port))
        endpoint.start([SERVICE])
        if config.restore:
            restore(coordinator, config.restore, config.lease_seconds)
        stop.at_once = False
        endpoint.set_serving(True)
        events.tell_ready(config.tell(endpoint.address))
        _keep(coordinator, keeper, config.snapshot_seconds, stop, events)
        endpoint.stop()  # before what answers its calls
        _LOG.info("ends, as it was asked to", extra={"event": "stopping"})


def restore(coordinator: Coordinator, name: str, lease_seconds: float) -> None:
    """Goes back to a snapshot's position of the data; trainers that have died must have had time to be missed.

    Raises:
        RefusedError: There is no such snapshot, or trainers are at work.
    """
    end = time.monotonic() + lease_seconds + 1.0
    while True:
        try:
            return coordinator.restore(name)
        except RefusedError as error:
            if error.refusal is not Refusal.FAILED_PRECONDITION or time.monotonic() > end:
                raise
            time.sleep(_RESTORE_SECONDS)


def _keep(
    coordinator: Coordinator,
    keeper: TakesSnapshots,
    snapshot_seconds: float,
    stop: StopSignal,
    events: EventFormatter,
) -> None:
    """Looks for members that are silent, and has snapshots taken, until the process is asked to stop.

    Raises:
        OSError: The coordinator cannot keep what it is told.
    """
    last = time.monotonic()
    while not stop.wait():
        if coordinator.failed is not None:
            raise OSError(f"{coordinator.failed}; what was acknowledged is still there: make room, and start it again")
        coordinator.tick()
        description = coordinator.description
        if description is None:
            continue
        events.run = description.run_id
        is_due = snapshot_seconds and time.monotonic() - last >= snapshot_seconds
        if is_due and description.durability != "none":
            _snapshot(keeper)
            last = time.monotonic()


def _snapshot(keeper: TakesSnapshots) -> None:
    try:
        taken = keeper.snapshot("")
    except (RefusedError, OSError) as error:  # the next one may succeed
        _LOG.error("no snapshot: %s", error, extra={"event": "snapshot_failed"})
        return
    _LOG.info("snapshot %s", taken.name, extra={"event": "snapshot", "snapshot": taken.name})

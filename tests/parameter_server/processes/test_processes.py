"""Coordinator and shards as processes: they start, end in good order, and say in one line why they cannot."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from embeddings.tables import TableConfig
from parameter_server.control.coordinator_client import GrpcCoordinatorClient, LocalCoordinatorClient
from parameter_server.control.coordinator_service import SERVICE, CoordinatorService
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.folder_lock import lock_folder
from parameter_server.processes import coordinator_process, shard_process
from parameter_server.processes.config import CoordinatorConfig, ShardConfig
from parameter_server.processes.endpoint import Endpoint
from parameter_server.processes.logs import EventFormatter
from parameter_server.processes.shard_membership import ShardMembership
from parameter_server.security.certificates import make_set
from parameter_server.security.security import ClientSecurity, ServerSecurity
from parameter_server.security.tls_config import TlsConfig

TOKEN = "0123456789abcdef0123"
RUN = RunDescription(run_id=7, seed=1, tables=(TableConfig(name="site", num_rows=100, dim=4),), durability="snapshot")
EVENTS = EventFormatter("text", "test")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, so that paths of sockets are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def coordinator_at(address: str, description: RunDescription | None = RUN) -> Iterator[Coordinator]:
    endpoint = Endpoint(ServerSecurity())
    with closing(Coordinator(description, lease_seconds=2.0)) as coordinator:
        CoordinatorService(coordinator).add_to(endpoint.server)
        endpoint.listen(address)
        endpoint.start([SERVICE])
        try:
            yield coordinator
        finally:
            endpoint.stop(0.0)


def shard_config(**settings: object) -> ShardConfig:
    given = {
        "coordinator": "unix:c",
        "address": "unix:s",
        "folder": Path("shard-0"),
        "connect_seconds": 0.3,
        **settings,
    }
    return ShardConfig(**given)  # type: ignore[arg-type]


def until(is_so: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.02)


def until_serving() -> None:
    """Waits for the shard at ``unix:s`` to say that it is well."""

    def is_serving() -> bool:
        try:
            return bool(
                HealthStub(channel).Check(HealthCheckRequest(), timeout=5).status == HealthCheckResponse.SERVING
            )
        except grpc.RpcError:
            return False

    with ClientSecurity().open_channel("unix:s", [("grpc.max_reconnect_backoff_ms", 100)]) as channel:
        until(is_serving)


def serve_while(serve: Callable[[], None], check: Callable[[], None]) -> None:
    """Runs a process's main in this thread, as it takes signals; and a check in another, which then asks it to end."""

    def work() -> None:
        try:
            check()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    former = signal.signal(signal.SIGTERM, lambda *_: None)  # where the process has ended by itself
    try:
        with ThreadPoolExecutor(1) as pool, contextlib.suppress(KeyboardInterrupt):
            checked: Future[None] = pool.submit(work)
            serve()
        checked.result()
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_shard_registers_takes_routes_saves_and_leaves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with coordinator_at("unix:c") as coordinator:

        def check() -> None:
            until(lambda: any(member.facts.get("route_epoch") for member in coordinator.status().members))
            (member,) = coordinator.status().members
            assert (member.role, member.name, member.shard, member.buckets) == ("shard", "shard-0", 0, 4096)
            until_serving()

        serve_while(lambda: shard_process.serve(shard_config(), EVENTS), check)
        assert [member for member in coordinator.status().members if member.alive] == []
    assert capsys.readouterr().out == "ready on unix:s\n"
    assert list((folder / "shard-0" / "snapshots").glob("*-base"))


def test_a_shard_that_was_given_up_registers_again(folder: Path) -> None:
    with coordinator_at("unix:c") as coordinator:

        def check() -> None:
            until(lambda: len(coordinator.status().members) == 1)
            until_serving()
            first = coordinator.status().members[0].member
            coordinator.leave(first)  # as if it had been silent
            until(lambda: any(member.alive and member.member != first for member in coordinator.status().members))
            assert coordinator.status().members[0].shard == 0

        serve_while(lambda: shard_process.serve(shard_config(), EVENTS), check)


def test_a_shard_that_cannot_keep_ends_with_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parameter_server.shard.shard import Shard

    with coordinator_at("unix:c"):
        monkeypatch.setattr(Shard, "failed", property(lambda self: "journal: No space left on device"))
        with pytest.raises(
            OSError, match=r"^shard 0: journal: No space left on device; what was acknowledged is still"
        ):
            shard_process.serve(shard_config(), EVENTS)


def test_what_keeps_a_shard_from_starting_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, **settings: object) -> None:
        with pytest.raises((ValueError, OSError), match=match) as error:
            shard_process.serve(shard_config(**settings), EVENTS)
        assert "\n" not in str(error.value)

    with closing(socket.socket()) as taken:  # told at once, also where there is no run to wait for
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(rf"--metrics-port {port}: the port is in use", metrics_port=port)
    refused(r"unix:c: cannot be reached: there is no such socket")
    refused(r"give --tls.certificate, --tls.key and --tls.authority", address="0.0.0.0:0", advertise="here:1")
    refused(r"give --tls.certificate, --tls.key and --tls.authority", coordinator="elsewhere:7000")
    with coordinator_at("unix:c") as coordinator:
        refused(r"--folder: expected one, as the run's durability is snapshot", folder=None, name="a")
        with closing(socket.socket(socket.AF_UNIX)) as taken:
            taken.bind("taken")
            taken.listen()
            refused(r"in use by another process; choose another --address", address="unix:taken")
        lock = lock_folder(folder / "shard-0")
        members = len(coordinator.status().members)
        refused(r"shard-0: expected a folder of this process alone")
        assert len(coordinator.status().members) == members
        lock.release()
        monkeypatch.setattr("parameter_server.coordinator.coordinator.PROTOCOL", (2, 0))
        refused(r"expected major version 2 .* got 1.0; run one release of recforge everywhere")


def test_a_folder_of_another_run_is_refused(folder: Path) -> None:
    with coordinator_at("unix:c"):
        serve_while(lambda: shard_process.serve(shard_config(), EVENTS), until_serving)
    other = RunDescription(run_id=8, seed=1, tables=RUN.tables)
    with coordinator_at("unix:c", other), pytest.raises(ValueError, match="of run 8, shard 0, got that of run 7"):
        shard_process.serve(shard_config(), EVENTS)


def test_what_keeps_a_coordinator_from_starting_is_one_line(folder: Path) -> None:
    lock = lock_folder(folder / "c")
    with pytest.raises(ValueError, match=r"--folder .*c: expected a folder of this process alone"):
        coordinator_process.serve(CoordinatorConfig(folder=folder / "c"), EVENTS)
    lock.release()
    (folder / "c" / coordinator_process.STATE).write_text("no state at all, but long enough to be looked at" * 10)
    with pytest.raises(ValueError, match="expected the state of a coordinator"):
        coordinator_process.serve(CoordinatorConfig(folder=folder / "c"), EVENTS)


def test_a_coordinator_says_the_address_that_others_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CoordinatorConfig(folder=folder / "c", address="unix:s", advertise="localhost:4711")
    serve_while(lambda: coordinator_process.serve(config, EVENTS), until_serving)
    assert capsys.readouterr().out == "ready on localhost:4711\n"


def test_heartbeats_go_on_after_a_coordinator_that_ends(folder: Path) -> None:
    class Ending:
        """A coordinator that is closed while calls still come in, and opened again."""

        def __init__(self, coordinator: Coordinator) -> None:
            self.inner, self.refusals = coordinator, 2

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def heartbeat(self, member: int, facts: object = None) -> object:
            if self.refusals:
                self.refusals -= 1
                raise RefusedError(Refusal.UNAVAILABLE, "the coordinator ends")
            return self.inner.heartbeat(member, facts)  # type: ignore[arg-type]

    with closing(Coordinator(RUN, lease_seconds=0.2)) as coordinator:
        ending = Ending(coordinator)
        client = LocalCoordinatorClient(ending)  # type: ignore[arg-type]
        with ShardMembership(client, "s", "local:0") as membership:
            until(lambda: not ending.refusals)
            first = membership.number
            until(lambda: coordinator.status().members[0].seconds_since_heard < 0.05, 10)
            membership.check()
            assert first == 0


def test_a_run_over_tls_with_a_token_from_start_to_end(folder: Path) -> None:
    make_set(folder / "tls", [])
    (folder / "token").write_text(TOKEN + "\n")
    tls = TlsConfig(
        certificate=folder / "tls/client.pem", key=folder / "tls/client.key", authority=folder / "tls/authority.pem"
    )
    flags = [
        f"--tls.{name}={folder}/tls/{file}"
        for name, file in (("certificate", "server.pem"), ("key", "server.key"), ("authority", "authority.pem"))
    ]
    flags += ["--token-file", "token", "--log-format", "json", "--limits.max-in-flight", "2"]
    with started("coordinator", "--folder", "c", "--address", "localhost:0", *flags) as coordinator:
        address = ready_on(coordinator)
        with started(
            "shard", "--coordinator", address, "--address", "localhost:0", "--folder", "shard-0", *flags
        ) as shard:
            security = ClientSecurity(tls=tls, token=TOKEN)
            with closing(GrpcCoordinatorClient(address, security)) as client:
                client.register("client", "me", "", RUN.to_json())
                assert client.routes(deadline_seconds=20).addresses.keys() == {0}
                assert ready_on(shard).startswith("localhost:")
            command = Path(f"/proc/{shard.pid}/cmdline").read_text()
            assert end(shard) == 0
        assert end(coordinator) == 0
    lines = [
        json.loads(line) for name in ("coordinator", "shard") for line in Path(f"{name}.err").read_text().splitlines()
    ]
    assert {line["event"] for line in lines} >= {"stopping", "saved"}
    assert all({"time", "level", "member", "run", "event", "message"} <= line.keys() for line in lines)
    assert {line["run"] for line in lines if line["event"] == "saved"} == {7}
    told = command + Path("shard.err").read_text() + Path("coordinator.err").read_text()
    assert TOKEN not in told


@contextmanager
def started(part: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    program = [sys.executable, "-m", "dlrm", "ps", part, *flags]
    with (
        Path(f"{part}.err").open("w") as errors,
        subprocess.Popen(program, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def ready_on(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    assert told["event"] == "ready"
    address: str = told["address"]
    return address


def end(process: subprocess.Popen[str]) -> int:
    process.terminate()
    return process.wait(30)

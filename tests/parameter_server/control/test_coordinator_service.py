"""The coordinator over gRPC: the same answers as in process, also across a kill; nothing that is sent breaks it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from embeddings.tables import TableConfig
from parameter_server.control import control_pb2 as pb
from parameter_server.control.coordinator_client import GrpcCoordinatorClient, LocalCoordinatorClient
from parameter_server.control.coordinator_service import SERVICE, CoordinatorService
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.coordinator.answers import Chunk, Finished
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, RefusedError
from parameter_server.processes.endpoint import Endpoint
from parameter_server.security.security import ServerSecurity

RUN = RunDescription(
    run_id=(1 << 64) - 1,
    seed=0,
    tables=(TableConfig(name="t", num_rows=10, dim=4, features=("f",)),),
    lanes=4,
    staleness=0,
    samples=60,
    batch_size=4,
    chunk_batches=3,
)
# Stands alone, so that it can be killed.
PROGRAM = """
import sys, time
from pathlib import Path
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.control.coordinator_service import CoordinatorService
from parameter_server.processes.endpoint import Endpoint
from parameter_server.security.security import ServerSecurity
coordinator = Coordinator(path=Path(sys.argv[1]) / "state")
endpoint = Endpoint(ServerSecurity())
CoordinatorService(coordinator).add_to(endpoint.server)
endpoint.listen("unix:" + sys.argv[1] + "/socket")
endpoint.start()
time.sleep(60)
"""


@contextmanager
def serve(coordinator: Coordinator, folder: Path) -> Iterator[str]:
    endpoint = Endpoint(ServerSecurity())
    CoordinatorService(coordinator).add_to(endpoint.server)
    address = endpoint.listen(f"unix:{folder}/c")
    endpoint.start(services=[SERVICE])
    try:
        yield address
    finally:
        endpoint.stop(0)


@pytest.fixture
def run() -> Iterator[Coordinator]:
    with closing(Coordinator(RUN)) as coordinator:
        yield coordinator


@pytest.fixture
def client(run: Coordinator, tmp_path: Path) -> Iterator[GrpcCoordinatorClient]:
    with serve(run, tmp_path) as address, closing(GrpcCoordinatorClient(address, deadline_seconds=5)) as client:
        yield client


def test_all_calls_answer_as_in_process(run: Coordinator, client: GrpcCoordinatorClient) -> None:
    shard = client.register("shard", "s", "local:0")
    assert shard.shard == 0
    assert shard.routes is not None
    trainer = client.register("trainer", "t", description_json=RUN.to_json())
    assert (trainer.description_json, trainer.shard) == (RUN.to_json(), None)
    beat = client.heartbeat(trainer.member, {"route_epoch": 1, "batches": 3.5})
    assert (beat.known, beat.route_epoch, beat.may_end) == (True, 1, False)
    assert client.describe() == RUN.to_json()
    routes = CoordinatorRoutes(client).current()
    assert (routes.epoch, routes.addresses, set(routes.owners.tolist())) == (1, {0: "local:0"}, {0})
    chunk = client.next_chunk(trainer.member)
    assert chunk == Chunk(index=0, lane=0, lease=1, first_clock=1, first_sample=0, num_samples=12, batch_size=4)
    client.gate(trainer.member, 0)
    client.complete_chunk(trainer.member, 0, 1, 0)
    assert client.client_lane(trainer.member) == (4, 1, 1)
    assert replace(client.status(), members=()) == replace(LocalCoordinatorClient(run).status(), members=())
    told = {member.name: member for member in client.status().members}
    assert told["t"].facts == {"route_epoch": 1, "batches": 3.5}
    assert (told["s"].buckets, told["s"].shard_state) == (4096, "active")
    with pytest.raises(RefusedError, match="expected another shard"):
        client.drain(0)
    with pytest.raises(RefusedError, match="snapshot"):
        client.snapshot("one")
    with pytest.raises(RefusedError, match="finished snapshot"):
        client.restore("one")
    with pytest.raises(RefusedError, match=r"expected major version 1 .* got 9\.0"):
        client.register("trainer", "t", protocol=(9, 0))
    while isinstance(chunk := client.next_chunk(trainer.member), Chunk):
        client.complete_chunk(trainer.member, chunk.lane, chunk.lease, chunk.index)
    assert isinstance(chunk, Finished)
    client.leave(trainer.member, {4: 7})
    assert not client.heartbeat(trainer.member).known
    other = client.register("client", "n").member
    assert client.client_lane(other) == (4, 2, 8)


def test_a_chunk_whose_answer_was_lost_is_given_again(client: GrpcCoordinatorClient) -> None:
    member = client.register("trainer", "t").member
    first = client.next_chunk(member)
    client._held[member].clear()  # as if it had never arrived
    assert client.next_chunk(member) == first
    assert client.next_chunk(member) != first


def test_a_fault_of_the_coordinator_is_told_at_once(
    client: GrpcCoordinatorClient, run: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("of its own")

    monkeypatch.setattr(run, "status", fail)
    began = time.monotonic()
    with pytest.raises(RefusedError, match=r"coordinator at .*: failed, see its log: ZeroDivisionError: of its own"):
        client.status()
    assert time.monotonic() - began < 5


def test_more_callers_wait_than_there_are_threads(client: GrpcCoordinatorClient, run: Coordinator) -> None:
    slow = client.register("trainer", "slow").member
    fast = [client.register("trainer", "fast").member for _ in range(40)]
    client.gate(slow, 0)
    for member in fast:
        client.gate(member, 0)
    waiting = [threading.Thread(target=client.gate, args=(member, 1)) for member in fast]
    for thread in waiting:
        thread.start()
    began = time.monotonic()
    assert client.heartbeat(slow).known
    assert time.monotonic() - began < 4
    client.gate(slow, 1)
    for thread in waiting:
        thread.join(10)
    assert not any(thread.is_alive() for thread in waiting)


def test_health_and_reflection(run: Coordinator, tmp_path: Path) -> None:
    with serve(run, tmp_path) as address, grpc.insecure_channel(address) as channel:
        for service in ("", SERVICE):  # as a whole, and as orchestrators ask for a service by its name
            asked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            assert asked.status == health_pb2.HealthCheckResponse.NOT_SERVING
        questions = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        listed, told = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(questions))
        assert SERVICE in {service.name for service in listed.list_services_response.service}
        file = descriptor_pb2.FileDescriptorProto.FromString(told.file_descriptor_response.file_descriptor_proto[0])
        (described,) = (service for service in file.service if f"{file.package}.{service.name}" == SERVICE)
        assert {method.name for method in described.method} == set(MESSAGES)


def test_a_killed_coordinator_goes_on(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    process = start()
    address = f"unix:{tmp_path}/socket"
    try:
        with closing(GrpcCoordinatorClient(address, deadline_seconds=30)) as client:
            client.register("shard", "s", "local:0")
            member = client.register("trainer", "t", description_json=RUN.to_json()).member
            held = client.next_chunk(member)
            assert isinstance(held, Chunk)
            source = CoordinatorRoutes(client)
            lane = client.client_lane(member)
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises(ConnectionLost):
                client.heartbeat(member)
            assert source.current().epoch == 1  # the data plane goes on
            process = start()
            client.complete_chunk(member, held.lane, held.lease, held.index)
            assert client.heartbeat(member).known
            after = client.next_chunk(member)
            assert isinstance(after, Chunk)
            assert after.index == held.index + 1
            assert client.status().chunks_completed == 1
            client.leave(member, {lane.lane: 1})
            other = client.register("client", "n").member
            assert client.client_lane(other) == (lane.lane, lane.lease + 1, 2)
            assert client.register("shard", "s", "local:0").shard == 0
            assert source.current().epoch == client.routes().epoch
    finally:
        process.kill()
        process.wait()


def test_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    message = "none: cannot be reached: there is no such socket; has its server been started[?]; tried for 0 s"
    client = GrpcCoordinatorClient(f"unix:{tmp_path}/none", deadline_seconds=0)
    with closing(client), pytest.raises(ConnectionLost, match=message):
        client.status()


@pytest.mark.parametrize("wait", ["describe", "routes", "gate"])
def test_waiting_for_one_that_is_not_there_ends_by_its_own_deadline(tmp_path: Path, wait: str) -> None:
    began = time.monotonic()
    arguments = (1, 1) if wait == "gate" else ()
    with (
        closing(GrpcCoordinatorClient(f"unix:{tmp_path}/none", deadline_seconds=30)) as client,
        pytest.raises(ConnectionLost, match=r"has its server been started[?]; tried for 0.3 s"),
    ):
        getattr(client, wait)(*arguments, deadline_seconds=0.3)
    assert time.monotonic() - began < 10


def test_no_call_is_tried_for_longer_than_it_is_said_to(tmp_path: Path) -> None:
    with (
        closing(GrpcCoordinatorClient(f"unix:{tmp_path}/none", deadline_seconds=0.3)) as client,
        pytest.raises(ConnectionLost, match=r"tried for 0.3 s"),
    ):
        client.routes(deadline_seconds=60)


CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
MESSAGES = {
    "Register": pb.RegisterRequest(major=1, role="trainer", name="t", description=RUN.to_json()),
    "Heartbeat": pb.HeartbeatRequest(member=1, facts={"rows": 1}),
    "Leave": pb.LeaveRequest(member=99, clocks={4: 5}),
    "Describe": pb.WaitRequest(),
    "GetRoutes": pb.RoutesRequest(newer_than=0),
    "NextChunk": pb.NextChunkRequest(member=2, holding=pb.Indices(indices=[1, 2, 3])),
    "CompleteChunk": pb.CompleteChunkRequest(member=2, lane=1, lease=1, index=1),
    "TakeClientLane": pb.MemberRequest(member=2),
    "Gate": pb.GateRequest(member=2, clock=3),
    "Snapshot": pb.SnapshotRequest(name="n"),
    "Restore": pb.SnapshotRequest(name="n"),
    "Drain": pb.DrainRequest(shard=0),
    "GetStatus": pb.StatusRequest(),
}


def mutate(rng: random.Random, message: bytes) -> bytes:
    """Gives a message that is damaged here and there, cut, doubled, or nothing but noise."""
    damaged = bytearray(message)
    for _ in range(rng.randrange(4)):
        if damaged:
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    if rng.random() < 0.2:
        del damaged[rng.randrange(len(damaged) + 1) :]
    if rng.random() < 0.1:
        damaged += message
    return bytes(damaged) if rng.random() < 0.9 else rng.randbytes(rng.randrange(60))


def fuzz(run: Coordinator, address: str, rounds: int, seed: int, now: list[float]) -> None:
    """Sends damaged messages; leases end by the run's clock `now`, and never between two looks at its state."""
    rng = random.Random(seed)
    with grpc.insecure_channel(address) as channel:
        methods: dict[str, grpc.UnaryUnaryMultiCallable] = {
            name: channel.unary_unary(f"/{SERVICE}/{name}") for name in MESSAGES
        }
        for _ in range(rounds):
            name = rng.choice(list(MESSAGES))
            sent = mutate(rng, MESSAGES[name].SerializeToString())
            now[0] += 0.01
            run.tick()
            before = list(run.state._open.iterdump()) if rng.random() < 0.02 else None
            call = methods[name].future(sent, timeout=20)
            code = call.code()
            # what cannot be parsed is answered by gRPC itself
            unparsed = code is grpc.StatusCode.INTERNAL and "deserializing request" in call.details()
            assert code in CODES or unparsed, f"{name} {sent!r}: {code} {call.details()}"
            assert code is grpc.StatusCode.OK or 0 < len(call.details()) <= 1000
            if before is not None and code is not grpc.StatusCode.OK:
                assert list(run.state._open.iterdump()) == before


@pytest.mark.parametrize("rounds", [2000, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_damaged_messages_are_answered_and_change_nothing(tmp_path: Path, rounds: int) -> None:
    now = [0.0]
    with closing(Coordinator(RUN, clock=lambda: now[0])) as run, serve(run, tmp_path) as address:
        run.register("shard", "s", "local:0")
        member = run.register("trainer", "t").member
        run.next_chunk(member)
        fuzz(run, address, rounds, rounds, now)
        with closing(GrpcCoordinatorClient(address)) as client:
            assert client.status().chunks == 5

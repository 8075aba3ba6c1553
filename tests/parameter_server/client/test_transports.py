"""Calls arrive once, refusals come back with all they say, and a server takes on no more than it was told to."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from parameter_server.errors import ConnectionLost, Refusal, RefusedError
from parameter_server.processes.rows_service import Gate, ServerLimits, add_rows_service, make_server
from parameter_server.security.security import ServerSecurity
from parameter_server.transports import GrpcConnection, LocalConnection
from parameter_server.wire import MAX_MESSAGE_BYTES, MAX_REPLY_BYTES


class Echo:
    """Answers with what it is asked; raises what it was given."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.calls: list[bytes] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def pull(self, message: bytes) -> list[bytes | memoryview]:
        self.calls.append(message)
        if self.error:
            raise self.error
        self.go_on.wait(10)
        return [message[:3], memoryview(message)[3:]]

    push = push_pull_dense = store = pull


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., str]]:
    servers = []

    def start(shard, address: str = "localhost:0", limits: ServerLimits | None = None) -> str:
        server = make_server(limits)
        servers.append(server)
        where = ServerSecurity().listen(server, address)
        add_rows_service(server, shard, limits)
        server.start()
        return where

    yield start
    for server in servers:
        server.stop(0).wait()


@pytest.fixture(params=["tcp", "unix", "local"])
def connection(request, serve, tmp_path):
    echo = Echo()
    if request.param == "local":
        opened = LocalConnection(echo)
    else:
        opened = GrpcConnection(serve(echo, "localhost:0" if request.param == "tcp" else f"unix:{tmp_path}/s"))
    yield echo, opened
    opened.close()


@pytest.mark.parametrize("verb", ["pull", "push", "push_pull_dense"])
def test_bytes_go_there_and_back(connection, verb) -> None:
    echo, opened = connection
    for length in (0, 10, MAX_MESSAGE_BYTES):
        message = b"x" * length
        assert getattr(opened, verb)(message).result(timeout=20) == message
    assert len(echo.calls) == 3


def test_refusals_say_what_the_shard_said(connection) -> None:
    echo, opened = connection
    for refusal in Refusal:
        echo.error = RefusedError(refusal, "for a reason", retry_after_seconds=0.25, expected_seq=9, moved=True)
        error = opened.pull(b"").exception(timeout=20)
        assert isinstance(error, RefusedError)
        assert str(error).endswith("for a reason")
        assert (error.refusal, error.retry_after_seconds) == (refusal, 0.25)
        assert (error.expected_seq, error.moved) == (9, True)
    echo.error = RefusedError(Refusal.UNAVAILABLE, "")
    error = opened.pull(b"").exception(timeout=20)
    assert isinstance(error, RefusedError)
    assert (error.retry_after_seconds, error.expected_seq, error.moved) == (None, None, False)


def test_a_handler_runs_once_per_call_whatever_it_says(serve) -> None:
    echo = Echo()
    opened = GrpcConnection(serve(echo))
    echo.error = RefusedError(Refusal.UNAVAILABLE, "not now")
    assert isinstance(opened.push(b"1").exception(timeout=20), RefusedError)
    echo.error = ZeroDivisionError("a fault")
    error = opened.push(b"2").exception(timeout=20)
    assert isinstance(error, ConnectionLost)
    assert "ZeroDivisionError: a fault" in str(error)
    assert echo.calls == [b"1", b"2"]
    opened.close()


def test_what_is_too_long_is_refused_for_good(serve) -> None:
    echo = Echo()
    opened = GrpcConnection(serve(echo))
    error = opened.push(bytes(MAX_REPLY_BYTES + 1)).exception(timeout=20)
    assert isinstance(error, RefusedError)
    assert error.refusal is Refusal.INVALID_ARGUMENT
    assert not echo.calls
    opened.close()


def test_nobody_there_is_a_lost_connection() -> None:
    opened = GrpcConnection("localhost:1")
    assert isinstance(opened.pull(b"").exception(timeout=20), ConnectionLost)
    opened.close()


def test_what_is_asked_of_a_closed_connection_is_lost(connection) -> None:
    echo, opened = connection
    opened.close()
    for verb in ("pull", "push", "push_pull_dense", "store"):
        assert isinstance(getattr(opened, verb)(b"").exception(timeout=20), ConnectionLost)
    assert not echo.calls


def test_plain_text_stays_on_this_machine() -> None:
    with pytest.raises(ValueError, match="expected TLS and a token"):
        GrpcConnection("192.0.2.1:5000")


def test_a_full_server_refuses_with_a_time_to_come_back(serve) -> None:
    echo = Echo()
    echo.go_on.clear()
    limits = ServerLimits(max_in_flight=1, max_waiting=2, retry_after_seconds=0.125)
    opened = GrpcConnection(serve(echo, limits=limits))
    calls = [opened.pull(b"x") for _ in range(5)]
    end = time.monotonic() + 20
    while (sum(call.done() for call in calls) < 2 or not echo.calls) and time.monotonic() < end:
        time.sleep(0.01)
    refused = [call.exception() for call in calls if call.done()]
    assert len(refused) == 2
    for error in refused:
        assert isinstance(error, RefusedError)
        assert (error.refusal, error.retry_after_seconds) == (Refusal.RESOURCE_EXHAUSTED, 0.125)
    assert len(echo.calls) == 1
    echo.go_on.set()
    assert sum(call.exception(timeout=20) is None for call in calls) == 3
    assert opened.pull(b"again").result(timeout=20) == b"again"
    opened.close()


def test_a_gate_counts_bytes_and_forgets_them() -> None:
    gate = Gate(ServerLimits(max_bytes=16 << 20))
    with gate.enter(10 << 20, None):
        with (
            pytest.raises(RefusedError, match="expected at most 20 messages of 16777216 bytes"),
            gate.enter(7 << 20, None),
        ):
            pass
        with gate.enter(6 << 20, 1.0):
            assert (gate.messages, gate.bytes) == (2, 16 << 20)
    assert (gate.messages, gate.bytes) == (0, 0)


def test_what_nobody_waits_for_is_not_worked_on(serve) -> None:
    echo = Echo()
    echo.go_on.clear()
    address = serve(echo, limits=ServerLimits(max_in_flight=1))
    patient, hasty = GrpcConnection(address), GrpcConnection(address, call_seconds=0.2)
    first = patient.pull(b"first")
    while not echo.calls:
        time.sleep(0.01)
    late = [hasty.pull(b"late") for _ in range(3)]
    assert all(isinstance(call.exception(timeout=20), ConnectionLost) for call in late)
    time.sleep(0.5)  # the server counts from when it learned of a call, which is later
    echo.go_on.set()
    assert first.result(timeout=20) == b"first"
    assert patient.pull(b"last").result(timeout=20) == b"last"
    assert echo.calls == [b"first", b"last"]
    patient.close()
    hasty.close()


def test_a_push_that_overtook_another_waits_for_it(serve) -> None:
    class InOrder:
        def __init__(self) -> None:
            self.next, self.early, self.lock = 0, set[bytes](), threading.Lock()

        def push(self, message: bytes) -> list[bytes | memoryview]:
            with self.lock:
                if int(message) > self.next:
                    self.early.add(message)
                    raise RefusedError(Refusal.OUT_OF_RANGE, "gap", expected_seq=self.next)
                self.next += 1
                return [message]

        pull = push_pull_dense = store = push

    shard = InOrder()
    opened = GrpcConnection(serve(shard, limits=ServerLimits(gap_seconds=20.0)))
    with ThreadPoolExecutor(4) as pool:
        later = [pool.submit(lambda n=n: opened.push(str(n).encode()).result(timeout=20)) for n in (3, 2, 1)]
        while len(shard.early) < 3:
            time.sleep(0.01)
        assert opened.push(b"0").result(timeout=20) == b"0"
        assert [call.result() for call in later] == [b"3", b"2", b"1"]
    opened.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_in_flight": 0},
        {"max_waiting": -1},
        {"max_bytes": 1},
        {"retry_after_seconds": -0.1},
        {"gap_seconds": math.nan},
        {"gap_seconds": math.inf},
    ],
)
def test_limits_that_are_none_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=f"--limits.{next(iter(wrong)).replace('_', '-')}: expected at least"):
        ServerLimits(**wrong)

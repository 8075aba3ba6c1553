"""A shard's four verbs as a gRPC service: bytes in, bytes out, and no more work taken on than there is room for."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from parameter_server.errors import ConnectionLost, Refusal, RefusedError
from parameter_server.grpc_status import abort
from parameter_server.transports import MESSAGE_OPTIONS, METHODS, SERVICE, RowsServer

if TYPE_CHECKING:
    import grpc

    from parameter_server.security.security import ServerSecurity

_SPARE_THREADS = 4  # for the control plane and health, when all places are taken

Verb = Callable[[bytes], Sequence[bytes | memoryview]]
Work = Callable[[bytes, "grpc.ServicerContext"], bytes]


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """How much a shard takes on at a time.

    Attributes:
        max_in_flight: Messages that are worked on at a time.
        max_waiting: Messages that wait for their turn; further ones are refused.
        max_bytes: Of all these messages; further ones are refused.
        retry_after_seconds: What a refused caller is told to wait.
        gap_seconds: How long a push waits here for an earlier one that is on its way, before it is refused.
    """

    max_in_flight: int = 4
    max_waiting: int = 16
    max_bytes: int = 128 << 20
    retry_after_seconds: float = 0.05
    gap_seconds: float = 0.2

    def __post_init__(self) -> None:
        leasts = {
            "max_in_flight": 1,
            "max_waiting": 0,
            "max_bytes": 16 << 20,
            "retry_after_seconds": 0,
            "gap_seconds": 0,
        }
        for name, least in leasts.items():
            if not least <= getattr(self, name) < math.inf:
                flag = f"--limits.{name.replace('_', '-')}"
                raise ValueError(f"{flag}: expected at least {least}, got {getattr(self, name)}")


def make_server(
    limits: ServerLimits | None = None,
    *,
    security: ServerSecurity | None = None,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
    streams: int = 0,
) -> grpc.Server:
    """Makes a server with as many threads as limits ask for, and messages as long as frames may be.

    Args:
        limits: By default those of ``ServerLimits``.
        security: What callers must show; by default nothing.
        interceptors: Further ones, around those of security.
        streams: Answers without an end that there may be at a time; each keeps a thread.
    """
    from parameter_server.security.security import SERVER_OPTIONS, import_grpc

    limits = limits or ServerLimits()
    threads = limits.max_in_flight + limits.max_waiting + streams + _SPARE_THREADS
    server: grpc.Server = import_grpc().server(
        ThreadPoolExecutor(threads, "grpc"),
        options=(*SERVER_OPTIONS, *MESSAGE_OPTIONS),
        interceptors=(*interceptors, *(security.interceptors() if security else ())),
    )
    return server


def add_rows_service(server: grpc.Server, shard: RowsServer, limits: ServerLimits | None = None) -> None:
    """Has a server answer for a shard."""
    import grpc

    limits = limits or ServerLimits()
    gate, gaps = Gate(limits), _Gaps(limits.gap_seconds)
    handlers = {}
    for name, verb_of in METHODS.items():
        work: Work = partial(_work, verb_of(shard), gate)
        if name == "Push":
            work = partial(gaps.work, work)
        handlers[name] = grpc.unary_unary_rpc_method_handler(partial(_answer, work))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class Gate:
    """Lets some messages in at a time, some wait, and refuses the rest."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(limits.max_in_flight)
        self.messages = 0
        self.bytes = 0

    @contextmanager
    def enter(self, num_bytes: int, seconds: float | None) -> Iterator[None]:
        """Waits for a place.

        Args:
            num_bytes: Of the message.
            seconds: How long the caller waits, or None.

        Raises:
            RefusedError: With RESOURCE_EXHAUSTED: there is no room.
            TimeoutError: Nobody waits any more for what would be done now.
        """
        limits = self._limits
        with self._lock:
            if self.messages >= limits.max_in_flight + limits.max_waiting or self.bytes + num_bytes > limits.max_bytes:
                raise RefusedError(
                    Refusal.RESOURCE_EXHAUSTED,
                    f"expected at most {limits.max_in_flight + limits.max_waiting} messages of {limits.max_bytes} "
                    f"bytes at a time, got one of {num_bytes} more than {self.messages} of {self.bytes}",
                    retry_after_seconds=limits.retry_after_seconds,
                )
            self.messages += 1
            self.bytes += num_bytes
        try:
            if (seconds is not None and seconds <= 0) or not self._turns.acquire(timeout=seconds):
                raise TimeoutError
            try:
                yield
            finally:
                self._turns.release()
        finally:
            with self._lock:
                self.messages -= 1
                self.bytes -= num_bytes


class _Gaps:
    """Holds a push that has overtaken an earlier one: both are on their way, and threads run in no order."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._applied = threading.Condition()
        self._count = 0

    def work(self, work: Work, message: bytes, context: grpc.ServicerContext) -> bytes:
        end = time.monotonic() + self._seconds
        while True:
            with self._applied:
                before = self._count
            try:
                reply = work(message, context)
            except RefusedError as error:
                if error.refusal is not Refusal.OUT_OF_RANGE or not self._wait(before, end):
                    raise
                continue
            with self._applied:
                self._count += 1
                self._applied.notify_all()
            return reply

    def _wait(self, before: int, end: float) -> bool:
        with self._applied:
            return self._applied.wait_for(lambda: self._count > before, max(0.0, end - time.monotonic()))


def _work(verb: Verb, gate: Gate, message: bytes, context: grpc.ServicerContext) -> bytes:
    with gate.enter(len(message), context.time_remaining()):
        if not context.is_active():  # cancelled while it waited
            raise TimeoutError
        return b"".join(verb(message))


def _answer(work: Work, message: bytes, context: grpc.ServicerContext) -> bytes:
    try:
        return work(message, context)
    except TimeoutError:
        abort(ConnectionLost("expired before it was worked on"), context)
    except Exception as error:
        abort(error, context, faults_pass=True)  # it comes again with the same number, and is applied once

"""A gRPC relay that loses calls or only their replies, delays, repeats and reorders them, from a seed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc

_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_HOP = frozenset({"user-agent", "te", "content-type"})  # gRPC writes these by itself


@dataclass(frozen=True, kw_only=True)
class MessageFaults:
    """Shares of unary calls which meet each fault.

    Attributes:
        drop_request: Never arrives; the caller sees UNAVAILABLE, or nothing until its deadline.
        drop_reply: Is carried out, but the caller sees UNAVAILABLE, or nothing until its deadline.
        hang: Share of dropped ones of which the caller sees nothing.
        duplicate: Is carried out twice, at the same time.
        late: Is carried out, and once more after a delay, long after its reply was given.
        delay: Waits, so that later calls overtake it.
        delay_seconds: How long, at most.
    """

    drop_request: float = 0.0
    drop_reply: float = 0.0
    hang: float = 0.2
    duplicate: float = 0.0
    late: float = 0.0
    delay: float = 0.0
    delay_seconds: float = 0.1


class MessageProxy:
    """Relays calls to ``target`` from a port of its own.

    Args:
        target: Address of a plain-text gRPC server.
        seed: Draws all faults: the n-th call meets the same ones again.
        faults: May be changed at any time.
        streams: Full names of methods that answer with a stream, which passes unharmed.
    """

    def __init__(self, target: str, *, seed: int, faults: MessageFaults, streams: Collection[str] = ()) -> None:
        self.seed, self.faults, self._streams = seed, faults, frozenset(streams)
        self.met: Counter[str] = Counter()  # faults, by name
        self._calls = 0
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._channel = grpc.insecure_channel(target, options=[*_OPTIONS, ("grpc.max_reconnect_backoff_ms", 200)])
        self._later = futures.ThreadPoolExecutor(16, "message-proxy-later")
        self._pool = futures.ThreadPoolExecutor(32, "message-proxy")
        self._server = grpc.server(self._pool, options=_OPTIONS)
        self._server.add_generic_rpc_handlers((_AnyMethod(self),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        """Ends all calls and threads."""
        self._is_over.set()
        self._server.stop(None).wait()
        self._pool.shutdown()
        self._later.shutdown(cancel_futures=True)
        self._channel.close()

    def __enter__(self) -> MessageProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def relay(self, method: str, message: bytes, context: grpc.ServicerContext) -> bytes:
        """Carries a unary call out, or not."""
        faults, chance = self.faults, self._draw()
        if chance.random() < faults.delay:
            self.met["delay"] += 1
            self._is_over.wait(chance.random() * faults.delay_seconds)
        if chance.random() < faults.drop_request:
            self._lose("drop_request", chance, context)
        if chance.random() < faults.duplicate:
            self.met["duplicate"] += 1
            self._later.submit(self._repeat, method, message, context.invocation_metadata(), 0.0)
        if chance.random() < faults.late:
            self.met["late"] += 1
            wait = chance.random() * 10 * faults.delay_seconds
            self._later.submit(self._repeat, method, message, context.invocation_metadata(), wait)
        reply = self._carry_out(method, message, context)
        if chance.random() < faults.drop_reply:
            self._lose("drop_reply", chance, context)
        return reply

    def relay_stream(self, method: str, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Passes a stream on as it is."""
        call = self._channel.unary_stream(method)(message, metadata=_passed_on(context.invocation_metadata()))
        context.add_callback(call.cancel)
        try:
            yield from call
        except grpc.RpcError as error:
            _fail_alike(error, context)

    def is_stream(self, method: str) -> bool:
        """Says whether a method answers with a stream."""
        return method in self._streams

    def _draw(self) -> random.Random:
        with self._lock:
            self._calls += 1
            return random.Random(f"{self.seed} {self._calls}")

    def _lose(self, fault: str, chance: random.Random, context: grpc.ServicerContext) -> None:
        self.met[fault] += 1
        if chance.random() < self.faults.hang:
            deadline = time.monotonic() + min(context.time_remaining() or 5.0, 5.0)
            while context.is_active() and time.monotonic() < deadline and not self._is_over.wait(0.02):
                pass
        context.abort(grpc.StatusCode.UNAVAILABLE, f"{fault}: lost by the proxy")

    def _carry_out(self, method: str, message: bytes, context: grpc.ServicerContext) -> bytes:
        call = self._channel.unary_unary(method)
        try:
            timeout = context.time_remaining()
            metadata = _passed_on(context.invocation_metadata())
            reply, done = call.with_call(message, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            _fail_alike(error, context)
        context.set_trailing_metadata(_passed_on(done.trailing_metadata()))
        return reply

    def _repeat(self, method: str, message: bytes, metadata: Any, wait_seconds: float) -> None:
        if not self._is_over.wait(wait_seconds):
            try:
                self._channel.unary_unary(method)(message, timeout=5, metadata=_passed_on(metadata))
            except grpc.RpcError as error:
                self.met[f"repeated: {error.code().name}"] += 1


class _AnyMethod(grpc.GenericRpcHandler):
    def __init__(self, proxy: MessageProxy) -> None:
        self._proxy = proxy

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method, proxy = details.method, self._proxy
        if proxy.is_stream(method):
            return grpc.unary_stream_rpc_method_handler(lambda message, at: proxy.relay_stream(method, message, at))
        return grpc.unary_unary_rpc_method_handler(lambda message, at: proxy.relay(method, message, at))


def _passed_on(metadata: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((key, value) for key, value in metadata or () if key not in _HOP and not key.startswith(":"))


def _fail_alike(error: grpc.RpcError, context: grpc.ServicerContext) -> None:
    context.set_trailing_metadata(_passed_on(error.trailing_metadata()))
    context.abort(error.code(), error.details() or "")

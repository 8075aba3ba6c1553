"""However many follow a shard without an end, further calls are answered, or refused at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from parameter_server.processes.endpoint import Endpoint
from parameter_server.processes.rows_service import ServerLimits, add_rows_service
from parameter_server.security.security import ServerSecurity

STREAMS = 8


class HeldRows:
    """A shard whose answers wait."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def pull(self, message: bytes) -> list[bytes]:
        self.begun.set()
        assert self.goes_on.wait(30)
        return [message]

    push = push_pull_dense = store = pull


def test_a_crowd_is_refused_while_readers_follow() -> None:
    rows, is_over = HeldRows(), threading.Event()

    def follow(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"first"
        assert is_over.wait(60)

    limits = ServerLimits(max_in_flight=1, max_waiting=0)
    endpoint = Endpoint(ServerSecurity(), limits, streams=STREAMS)
    add_rows_service(endpoint.server, rows, limits)
    handlers = {"Follow": grpc.unary_stream_rpc_method_handler(follow)}
    endpoint.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    address = endpoint.listen("localhost:0")
    endpoint.start()
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(1) as pool:
        followed: list[Any] = [channel.unary_stream("/test/Follow")(b"", timeout=20) for _ in range(STREAMS)]
        assert [next(answers) for answers in followed] == [b"first"] * STREAMS
        pull = channel.unary_unary("/recforge.Rows/Pull")
        held = pool.submit(pull, b"one", timeout=30)
        assert rows.begun.wait(20)
        with pytest.raises(grpc.RpcError) as refused:
            pull(b"another", timeout=20)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert HealthStub(channel).Check(HealthCheckRequest(), timeout=20)
        rows.goes_on.set()
        is_over.set()
        assert held.result(30) == b"one"
    endpoint.stop(0.0)

"""The proxies do the harm they say, and nothing else: chaos that does not happen would prove nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from byte_proxy import ByteFaults, ByteProxy
from message_proxy import MessageFaults, MessageProxy

METHOD = "/recforge.Test/Echo"


class EchoServer(grpc.GenericRpcHandler):
    """Answers with the request, and counts what has arrived in which order."""

    def __init__(self) -> None:
        self.arrived: list[bytes] = []
        self.lock = threading.Lock()
        self.pool = futures.ThreadPoolExecutor(8)
        self.server = grpc.server(self.pool, options=[("grpc.max_receive_message_length", 16 << 20)])
        self.server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self.echo)

    def echo(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        with self.lock:
            self.arrived.append(message)
        return message


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.server.stop(None).wait()
    server.pool.shutdown()


def call(channel: grpc.Channel, message: bytes) -> bool:
    try:
        assert channel.unary_unary(METHOD)(message, timeout=5) == message
    except grpc.RpcError:
        return False
    return True


def call_again(channel: grpc.Channel, message: bytes) -> None:
    """Calls where connections were cut: gRPC may know of one only from a call that goes lost with it."""
    end = time.monotonic() + 20
    while not call(channel, message):
        assert time.monotonic() < end


def test_messages_are_lost_repeated_and_overtaken_and_a_seed_repeats_it(echo: EchoServer) -> None:
    faults = MessageFaults(drop_request=0.2, drop_reply=0.2, hang=0, duplicate=0.2, late=0.2, delay=0.2)
    outcomes = []
    for _ in range(2):
        echo.arrived.clear()
        with (
            MessageProxy(echo.address, seed=3, faults=faults) as proxy,
            grpc.insecure_channel(proxy.address) as channel,
        ):
            answered = [call(channel, bytes([number])) for number in range(40)]
            arrivals = 40 - proxy.met["drop_request"] + proxy.met["duplicate"] + proxy.met["late"]
            end = time.monotonic() + 20
            while len(echo.arrived) < arrivals and time.monotonic() < end:  # the late ones
                time.sleep(0.01)
        assert len(echo.arrived) == arrivals
        times = Counter(echo.arrived)
        outcomes.append((answered, proxy.met, times))
    answered, met, times = outcomes[0]
    assert outcomes[0] == outcomes[1]
    assert all(met[fault] for fault in ("drop_request", "drop_reply", "duplicate", "late", "delay"))
    assert sum(answered) == 40 - met["drop_request"] - met["drop_reply"]
    assert all(times[bytes([number])] for number, good in enumerate(answered) if good)
    assert any(times[bytes([number])] for number, good in enumerate(answered) if not good), "no reply was lost"
    assert max(times.values()) > 1
    assert echo.arrived != sorted(echo.arrived), "all came in order"


def test_bytes_are_cut_in_the_middle_of_a_message(echo: EchoServer) -> None:
    faults = ByteFaults(reset=1.0, reset_bytes=1 << 20)
    with ByteProxy(echo.address, seed=1, faults=faults) as proxy:
        with grpc.insecure_channel(proxy.address) as channel:
            assert not call(channel, bytes(2 << 20))  # longer than any connection lives
        assert proxy.harmed == proxy.connections > 0
        proxy.faults = ByteFaults()
        with grpc.insecure_channel(proxy.address) as channel:
            call_again(channel, bytes(2 << 20))
            proxy.reset_all()
    assert echo.arrived == [bytes(2 << 20)]


def test_an_answer_is_lost_of_what_has_arrived(echo: EchoServer) -> None:
    with (
        ByteProxy(echo.address, seed=1, faults=ByteFaults(unanswered=b"in vain")) as proxy,
        grpc.insecure_channel(proxy.address) as channel,
    ):
        assert call(channel, b"asked")
        lost = channel.unary_unary(METHOD).future(bytes(100_000) + b"in vain")
        end = time.monotonic() + 20
        while len(echo.arrived) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        proxy.reset_all()
        assert isinstance(lost.exception(20), grpc.RpcError)
        proxy.faults = ByteFaults()
        call_again(channel, b"in vain")


def test_bytes_wait_where_a_network_is_slow_or_silent(echo: EchoServer) -> None:
    for faults in (ByteFaults(bytes_per_second=1e6), ByteFaults(silence=1.0, reset_bytes=1000, silence_seconds=0.4)):
        with ByteProxy(echo.address, seed=1, faults=faults) as proxy, grpc.insecure_channel(proxy.address) as channel:
            start = time.monotonic()
            assert call(channel, bytes(300_000))
            assert time.monotonic() - start > 0.25

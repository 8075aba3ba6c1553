"""What a client holds of one shard: its verbs as futures, within this process or over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from parameter_server.errors import ConnectionLost
from parameter_server.grpc_status import error_of
from parameter_server.wire import MAX_REPLY_BYTES

if TYPE_CHECKING:
    from parameter_server.security.security import ClientSecurity

SERVICE = "recforge.Rows"
CALL_SECONDS = 30.0

MESSAGE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
    ("grpc.max_send_message_length", MAX_REPLY_BYTES),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *MESSAGE_OPTIONS,
    # gRPC's own retries were seen to run a handler three times for one call: callers send again, with the same number.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A channel of its own for each connection: another's back-off is not this one's.
    ("grpc.use_local_subchannel_pool", 1),
)


class RowsServer(Protocol):
    """The verbs of a shard, as its engine has them: a message in, the parts of the reply out."""

    def pull(self, message: bytes) -> Sequence[bytes | memoryview]:
        """Answers each frame of ids with one of rows."""

    def push(self, message: bytes) -> Sequence[bytes | memoryview]:
        """Applies frames, and answers each that has been with a header."""

    def push_pull_dense(self, message: bytes) -> Sequence[bytes | memoryview]:
        """Exchanges pieces of the dense part."""

    def store(self, message: bytes) -> Sequence[bytes | memoryview]:
        """Reads or overwrites whole rows, see ``row_storage``."""


class ShardConnection(Protocol):
    """One shard, as a client sees it. Exceptions of the futures are ``RefusedError`` and ``ConnectionLost``."""

    def pull(self, message: bytes) -> Future[bytes]:
        """Asks for rows."""

    def push(self, message: bytes) -> Future[bytes]:
        """Sends gradients; the future is done once they are applied, and kept as the run has promised."""

    def push_pull_dense(self, message: bytes) -> Future[bytes]:
        """Exchanges pieces of the dense part."""

    def store(self, message: bytes) -> Future[bytes]:
        """Reads or overwrites whole rows, see ``row_storage``."""

    def close(self) -> None:
        """Ends calls under way, and what serves them."""


class LocalConnection:
    """A shard within this process; pushes are applied in the order in which they come.

    Args:
        shard: Is not closed with the connection.
    """

    def __init__(self, shard: RowsServer) -> None:
        self._shard = shard
        # A push that waits for the disk must not hold up pulls.
        self._pulls = ThreadPoolExecutor(1, "local-pulls")
        self._pushes = ThreadPoolExecutor(1, "local-pushes")

    def pull(self, message: bytes) -> Future[bytes]:
        """See ``ShardConnection``."""
        return _submit(self._pulls, self._shard.pull, message)

    def push(self, message: bytes) -> Future[bytes]:
        """See ``ShardConnection``."""
        return _submit(self._pushes, self._shard.push, message)

    def push_pull_dense(self, message: bytes) -> Future[bytes]:
        """See ``ShardConnection``."""
        return _submit(self._pushes, self._shard.push_pull_dense, message)

    def store(self, message: bytes) -> Future[bytes]:
        """See ``ShardConnection``."""
        return _submit(self._pushes, self._shard.store, message)

    def close(self) -> None:
        """See ``ShardConnection``."""
        for pool in (self._pulls, self._pushes):
            pool.shutdown(cancel_futures=True)


class GrpcConnection:
    """A shard behind gRPC.

    Args:
        address: ``host:port`` or ``unix:/path``.
        security: What is shown to the server; by default nothing, and only to servers of this machine.
        call_seconds: After which a call counts as lost.

    Raises:
        ValueError: Plain text would leave the machine, or gRPC is not installed.
    """

    def __init__(
        self, address: str, security: ClientSecurity | None = None, *, call_seconds: float = CALL_SECONDS
    ) -> None:
        from parameter_server.security.security import ClientSecurity

        self.address = address
        self._call_seconds = call_seconds
        self._channel = (security or ClientSecurity()).open_channel(address, CHANNEL_OPTIONS)
        self._methods = {name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in METHODS}

    def pull(self, message: bytes) -> Future[bytes]:
        """See ``ShardConnection``."""
        return self._call("Pull", message)

    def push(self, message: bytes) -> Future[bytes]:
        """See ``ShardConnection``."""
        return self._call("Push", message)

    def push_pull_dense(self, message: bytes) -> Future[bytes]:
        """See ``ShardConnection``."""
        return self._call("PushPullDense", message)

    def store(self, message: bytes) -> Future[bytes]:
        """See ``ShardConnection``."""
        return self._call("Store", message)

    def close(self) -> None:
        """See ``ShardConnection``."""
        self._channel.close()

    def _call(self, method: str, message: bytes) -> Future[bytes]:
        answer: Future[bytes] = Future()
        answer.set_running_or_notify_cancel()  # what is on its way cannot be called back
        try:
            call = self._methods[method].future(message, timeout=self._call_seconds)
        except ValueError as error:  # the channel is closed
            answer.set_exception(ConnectionLost(f"shard at {self.address}: {error}"))
            return answer
        call.add_done_callback(lambda call: _hand_over(call, answer, self.address))
        return answer


METHODS: dict[str, Callable[[RowsServer], Callable[[bytes], Sequence[bytes | memoryview]]]] = {
    "Pull": lambda shard: shard.pull,
    "Push": lambda shard: shard.push,
    "PushPullDense": lambda shard: shard.push_pull_dense,
    "Store": lambda shard: shard.store,
}
"""gRPC's name of each verb."""


def _submit(
    pool: ThreadPoolExecutor, verb: Callable[[bytes], Sequence[bytes | memoryview]], message: bytes
) -> Future[bytes]:
    try:
        return pool.submit(lambda: b"".join(verb(message)))
    except RuntimeError as error:  # closed, as routes no longer name the shard
        lost: Future[bytes] = Future()
        lost.set_exception(ConnectionLost(f"shard of this process: {error}"))
        return lost


def _hand_over(call: Any, answer: Future[bytes], address: str) -> None:
    """Passes on how a call ended; an error goes nowhere else, so that none may be raised here."""
    import grpc

    try:
        answer.set_result(call.result())
    except grpc.RpcError as error:
        answer.set_exception(error_of(error, f"shard at {address}"))
    except (grpc.FutureCancelledError, grpc.FutureTimeoutError) as error:
        answer.set_exception(ConnectionLost(f"shard at {address}: {error or 'cancelled'}"))

"""How a reader follows one shard: within this process, or over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from parameter_server.errors import ConnectionLost
from parameter_server.feed.messages import METHOD
from parameter_server.feed.service import ChangesSource, follow_shard
from parameter_server.grpc_status import error_of
from parameter_server.transports import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from parameter_server.security.security import ClientSecurity


class LocalFeed:
    """The feed of a shard within this process.

    Args:
        source: The shard.
        history: Of its versions: another one after it was made anew.
    """

    def __init__(self, source: ChangesSource, *, history: int = 1) -> None:
        self._source, self._history = source, history
        self._is_over = threading.Event()

    def follow(self, request: bytes) -> Iterator[bytes]:
        """See ``FeedConnection``."""
        return follow_shard(self._source, request, self._history, self._is_over)

    def close(self) -> None:
        """See ``FeedConnection``."""
        self._is_over.set()


class GrpcFeed:
    """The feed of a shard behind gRPC.

    Args:
        address: ``host:port`` or ``unix:/path``.
        security: What is shown to the server; by default nothing, and only to servers of this machine.

    Raises:
        ValueError: Plain text would leave the machine, or gRPC is not installed.
    """

    def __init__(self, address: str, security: ClientSecurity | None = None) -> None:
        from parameter_server.security.security import ClientSecurity

        self.address = address
        self._channel = (security or ClientSecurity()).open_channel(address, CHANNEL_OPTIONS)

    def follow(self, request: bytes) -> Iterator[bytes]:
        """See ``FeedConnection``."""
        import grpc

        try:
            call: Any = self._channel.unary_stream(METHOD)(request)
            yield from call
        except grpc.RpcError as error:
            raise error_of(error, f"shard at {self.address}") from None
        except ValueError as error:  # the channel is closed
            raise ConnectionLost(f"shard at {self.address}: {error}") from None

    def close(self) -> None:
        """See ``FeedConnection``."""
        self._channel.close()

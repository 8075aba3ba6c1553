"""The run's token: a client's calls bring it, and a server lets nothing in without it."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

import grpc

OPEN_TO_ALL = "/grpc.health.v1.Health/"  # whoever restarts members asks this without a token
HEADER = "authorization"

Metadata = tuple[tuple[str, str], ...]


class TokenCheck(grpc.ServerInterceptor):
    """Refuses calls without the token, before anything of their requests is read."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        # A unary handler would wait for its request first.
        self._refused = grpc.stream_unary_rpc_method_handler(_refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], call: Any) -> Any:
        """Passes a call on, or not."""
        given = dict(call.invocation_metadata).get(HEADER, "")
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            return continuation(call)
        return continuation(call) if call.method.startswith(OPEN_TO_ALL) else self._refused


class TokenBringer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to each call of a channel."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def _bring(self, continuation: Callable[[Any, Any], Any], call: Any, request: Any) -> Any:
        return continuation(call._replace(metadata=(*(call.metadata or ()), *self._metadata)), request)

    intercept_unary_unary = intercept_unary_stream = _bring
    intercept_stream_unary = intercept_stream_stream = _bring


def token_metadata(token: str) -> Metadata:
    """Gives what goes with a call; nothing without a token."""
    return ((HEADER, f"Bearer {token}"),) if token else ()


def _refuse(_: Any, context: grpc.ServicerContext) -> None:
    got = "another" if HEADER in dict(context.invocation_metadata()) else "none"
    context.abort(grpc.StatusCode.UNAUTHENTICATED, f"token: expected that of the run (--token-file), got {got}")

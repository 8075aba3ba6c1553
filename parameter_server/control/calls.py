"""Calls of the control plane over gRPC: refusals travel as statuses, and a lost connection is an error of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from parameter_server.client.transports import REFUSAL_KEY, RETRY_AFTER_KEY
from parameter_server.errors import ConnectionLost, Refusal, RefusedError

if TYPE_CHECKING:
    import grpc

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")
MAX_DETAILS = 1000  # characters of a status; gRPC refuses to send long ones


def answer(work: Callable[[], _Answer], context: grpc.ServicerContext) -> _Answer:
    """Answers a call; what it raises ends it with a status."""
    try:
        return work()
    except Exception as error:
        abort(error, context)
        raise  # not reached: abort raises


def abort(error: Exception, context: grpc.ServicerContext) -> None:
    """Ends a call with the status that an error stands for."""
    import grpc

    if isinstance(error, RefusedError):
        facts = [(REFUSAL_KEY, error.refusal.name)]
        if error.retry_after_seconds is not None:
            facts.append((RETRY_AFTER_KEY, str(round(error.retry_after_seconds * 1e3))))
        context.set_trailing_metadata(tuple(facts))
        context.abort(grpc.StatusCode[error.refusal.name], _one_line(str(error)))
    if isinstance(error, ConnectionError):
        context.abort(grpc.StatusCode.UNAVAILABLE, _one_line(str(error)))
    _log.error("a call failed", exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, _one_line(f"{type(error).__name__}: {error}"))


def call(method: Callable[..., _Answer], request: object, seconds: float, whom: str) -> _Answer:
    """Makes a call.

    Raises:
        RefusedError: It was refused.
        ConnectionLost: There was no answer within so many seconds.
    """
    import grpc

    try:
        return method(request, timeout=seconds)
    except grpc.RpcError as error:
        raise translate(error, whom) from error
    except ValueError as error:  # the channel is closed
        raise ConnectionLost(f"{whom}: {error}") from error


def stream(method: Callable[..., Iterator[_Answer]], request: object, seconds: float, whom: str) -> Iterator[_Answer]:
    """Makes a call that is answered in pieces; raises as ``call`` does."""
    import grpc

    try:
        yield from method(request, timeout=seconds)
    except grpc.RpcError as error:
        raise translate(error, whom) from error
    except ValueError as error:
        raise ConnectionLost(f"{whom}: {error}") from error


def translate(error: Any, whom: str) -> Exception:
    """Gives the error that a server meant, or ConnectionLost where there was no answer."""
    status, details = error.code().name, error.details() or ""
    facts = dict(error.trailing_metadata() or ())
    if refusal := Refusal.__members__.get(facts.get(REFUSAL_KEY, "")):
        after = facts.get(RETRY_AFTER_KEY)
        return RefusedError(refusal, details, retry_after_seconds=int(after) / 1e3 if after else None)
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return RefusedError(Refusal.UNAUTHENTICATED, f"{whom}: {details}")
    if status in ("UNIMPLEMENTED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"):
        return RefusedError(Refusal.INVALID_ARGUMENT, f"{whom}: {details}; run one release of recforge everywhere")
    return ConnectionLost(f"{whom}: {details} ({status})")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_DETAILS]

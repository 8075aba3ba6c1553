"""Calls of the control plane over gRPC: refusals travel as statuses, and a lost connection is an error of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from parameter_server.control import control_pb2 as pb
from parameter_server.errors import ConnectionLost
from parameter_server.grpc_status import abort, error_of

if TYPE_CHECKING:
    import grpc

_Answer = TypeVar("_Answer")


def answer(work: Callable[[], _Answer], context: grpc.ServicerContext) -> _Answer:
    """Answers a call; what it raises ends it with a status."""
    try:
        return work()
    except Exception as error:
        abort(error, context)


def done(work: Callable[[], None], context: grpc.ServicerContext) -> pb.Done:
    """Answers a call that gives nothing back."""

    def with_reply() -> pb.Done:
        work()
        return pb.Done()

    return answer(with_reply, context)


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
        raise error_of(error, whom) from error
    except ValueError as error:  # the channel is closed
        raise ConnectionLost(f"{whom}: {error}") from error


def stream(method: Callable[..., Iterator[_Answer]], request: object, seconds: float, whom: str) -> Iterator[_Answer]:
    """Makes a call that is answered in pieces; raises as ``call`` does."""
    import grpc

    try:
        yield from method(request, timeout=seconds)
    except grpc.RpcError as error:
        raise error_of(error, whom) from error
    except ValueError as error:
        raise ConnectionLost(f"{whom}: {error}") from error

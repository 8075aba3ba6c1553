"""Errors as gRPC statuses and back: one form for rows, control plane and feed, so that no caller learns less of one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn

from parameter_server.errors import ConnectionLost, Refusal, RefusedError

if TYPE_CHECKING:
    import grpc

REFUSAL_KEY = "recforge-refusal"  # sets a server's own refusals apart from what gRPC says with the same status
RETRY_AFTER_KEY = "recforge-retry-after-ms"
EXPECTED_SEQ_KEY = "recforge-expected-seq"
MOVED_KEY = "recforge-moved"
FAULT_KEY = "recforge-fault"
MAX_DETAILS = 1000  # characters of a status; gRPC refuses to send long ones
_LOG = logging.getLogger(__name__)


def abort(error: Exception, context: grpc.ServicerContext, *, faults_pass: bool = False) -> NoReturn:
    """Ends a call with the status that an error stands for.

    Args:
        error: A ``RefusedError``; a ``ConnectionError``, of which the caller is told as of its own; or a fault of the
            program, which is logged.
        context: Of the call.
        faults_pass: Whether the caller should try again after a fault.
    """
    import grpc

    if isinstance(error, RefusedError):
        context.set_trailing_metadata(facts_of(error))
        context.abort(grpc.StatusCode[error.refusal.name], _one_line(str(error)))
    if isinstance(error, ConnectionError):
        context.abort(grpc.StatusCode.UNAVAILABLE, _one_line(str(error)))
    _LOG.error("a call failed", exc_info=error)
    if not faults_pass:
        context.set_trailing_metadata(((FAULT_KEY, "1"),))
    context.abort(grpc.StatusCode.INTERNAL, _one_line(f"{type(error).__name__}: {error}"))
    raise error  # not reached: abort raises


def facts_of(error: RefusedError) -> tuple[tuple[str, str], ...]:
    """Gives what a status alone does not tell of a refusal, as trailing metadata."""
    facts = [(REFUSAL_KEY, error.refusal.name)]
    if error.retry_after_seconds is not None:
        facts.append((RETRY_AFTER_KEY, str(round(error.retry_after_seconds * 1e3))))
    if error.expected_seq is not None:
        facts.append((EXPECTED_SEQ_KEY, str(error.expected_seq)))
    if error.moved:
        facts.append((MOVED_KEY, "1"))
    return tuple(facts)


def error_of(error: Any, whom: str) -> RefusedError | ConnectionLost:
    """Gives the error that a server meant, or ConnectionLost where it may have meant nothing.

    Args:
        error: The ``grpc.RpcError`` of a call.
        whom: Was called; the message begins with it.
    """
    status, details = error.code().name, error.details() or ""
    facts = dict(error.trailing_metadata() or ())
    message = f"{whom}: {details}"
    if refusal := Refusal.__members__.get(facts.get(REFUSAL_KEY, "")):
        after, seq = facts.get(RETRY_AFTER_KEY), facts.get(EXPECTED_SEQ_KEY)
        return RefusedError(
            refusal,
            message,
            retry_after_seconds=int(after) / 1e3 if after else None,
            expected_seq=int(seq) if seq else None,
            moved=MOVED_KEY in facts,
        )
    if FAULT_KEY in facts:  # of its program: it would fail again; gRPC's own errors of this status may not
        return RefusedError(Refusal.INVALID_ARGUMENT, f"{whom}: failed, see its log: {details}")
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return RefusedError(Refusal.UNAUTHENTICATED, message)
    if status == "RESOURCE_EXHAUSTED":
        # gRPC's own limit of sizes stays; its others, on calls at a time, pass.
        is_too_long = "larger than max" in details
        return RefusedError(Refusal.INVALID_ARGUMENT if is_too_long else Refusal.RESOURCE_EXHAUSTED, message)
    if status in ("UNIMPLEMENTED", "INVALID_ARGUMENT"):
        return RefusedError(Refusal.INVALID_ARGUMENT, f"{message}; run one release of recforge everywhere")
    return ConnectionLost(f"{message} ({status})")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_DETAILS]

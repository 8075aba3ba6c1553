"""Counts a server's calls, from the moment they arrive: how long they took, what became of them, how many wait."""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc

LATENCY_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds
_NOT_SERVED = ("grpc.health.", "grpc.reflection.")


class CallMeter(grpc.ServerInterceptor):
    """Measures unary calls.

    Attributes:
        in_flight: Calls that are worked on, or wait for it, by method.
        ended: How many have ended, by method and status.
        latencies: By method, how many took longer than each bound of ``LATENCY_BOUNDS``, and not than the next.
        seconds: Of all calls that have ended, by method.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.in_flight: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.latencies: dict[str, list[int]] = {}
        self.seconds: dict[str, float] = {}

    def intercept_service(self, continuation: Callable[[Any], Any], call: Any) -> Any:
        """Has a call measured."""
        handler = continuation(call)
        service, _, method = call.method.lstrip("/").partition("/")
        if handler is None or handler.response_streaming or service.startswith(_NOT_SERVED):
            return handler
        # A refused call has a handler that reads no request.
        kind = "stream_unary" if handler.request_streaming else "unary_unary"
        measured = self._measure(method, getattr(handler, kind))
        return handler._replace(**{kind: measured})

    def copy(self) -> CallMeter:
        """Gives the counts as they are now."""
        taken = CallMeter()
        with self._lock:
            taken.in_flight, taken.ended = self.in_flight.copy(), self.ended.copy()
            taken.seconds = dict(self.seconds)
            taken.latencies = {method: list(counts) for method, counts in self.latencies.items()}
        return taken

    def _measure(self, method: str, work: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def measured(request: Any, context: Any) -> Any:
            began = time.monotonic()
            with self._lock:
                self.in_flight[method] += 1
            status = grpc.StatusCode.UNKNOWN  # of a handler that raises without one
            try:
                answer = work(request, context)
                status = context.code() or grpc.StatusCode.OK
                return answer
            except Exception:
                status = context.code() or status
                raise
            finally:
                self._end(method, status.name, time.monotonic() - began)

        return measured

    def _end(self, method: str, status: str, seconds: float) -> None:
        place = bisect.bisect_left(LATENCY_BOUNDS, seconds)
        with self._lock:
            self.in_flight[method] -= 1
            self.ended[method, status] += 1
            self.seconds[method] = self.seconds.get(method, 0.0) + seconds
            self.latencies.setdefault(method, [0] * (len(LATENCY_BOUNDS) + 1))[place] += 1

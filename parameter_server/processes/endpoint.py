"""A gRPC server as each member has one: with health and reflection, on one address, closed to strangers."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import DESCRIPTOR as HEALTH
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from parameter_server.processes.rows_service import ServerLimits, make_server
from parameter_server.security.security import ServerSecurity

STOP_SECONDS = 5.0  # for calls that are under way


class Endpoint:
    """A server to which services are added before it starts; it says NOT_SERVING until told otherwise.

    Args:
        security: What callers must show.
        limits: How much is taken on at a time.
        interceptors: Further ones, around the check of the token.
        streams: Answers without an end that there may be at a time.

    Attributes:
        server: To which services are added.
        address: Where it listens.
    """

    def __init__(
        self,
        security: ServerSecurity,
        limits: ServerLimits | None = None,
        *,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
        streams: int = 0,
    ) -> None:
        self._security = security
        self.server = make_server(limits, security=security, interceptors=interceptors, streams=streams)
        self.address = ""
        self._has_started = False
        self._services = [""]  # the server as a whole
        self._health = HealthServicer()
        add_HealthServicer_to_server(self._health, self.server)
        self.set_serving(False)

    def listen(self, address: str) -> str:
        """Takes an address, and gives it with the port that was taken; callers wait until ``start``.

        Args:
            address: ``host:port`` or ``unix:/path``.

        Raises:
            ValueError: See ``ServerSecurity.listen``.
            OSError: See there.
        """
        try:
            self.address = self._security.listen(self.server, address)
        except BaseException:
            self.stop(0.0)
            raise
        return self.address

    def start(self, services: Sequence[str] = ()) -> None:
        """Answers calls from now on.

        Args:
            services: Full names of the added ones that reflection tells of; health answers for each of them too.
        """
        self._services += services
        self.set_serving(self._is_serving)
        health = [service.full_name for service in HEALTH.services_by_name.values()]
        reflection.enable_server_reflection([*services, *health, reflection.SERVICE_NAME], self.server)
        self.server.start()
        self._has_started = True

    def set_serving(self, is_serving: bool) -> None:
        """Sets what health answers."""
        self._is_serving = is_serving
        status = HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
        for service in self._services:
            self._health.set(service, status)

    def stop(self, grace_seconds: float = STOP_SECONDS) -> None:
        """Takes no further calls, and waits for those that are under way."""
        self.set_serving(False)
        if not self._has_started:
            self.server.start()  # or gRPC keeps the address
        self.server.stop(grace_seconds).wait()

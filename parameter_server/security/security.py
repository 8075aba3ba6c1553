"""Who may talk to whom: TLS on both sides from files, a token per run, and no plain text off this machine."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameter_server.address import Address, connect
from parameter_server.security.tls_config import TlsConfig

if TYPE_CHECKING:
    import grpc

TOKEN_VARIABLE = "RECFORGE_TOKEN"
MIN_TOKEN = 16  # characters
NO_GRPC = "gRPC is not installed; run: pip install 'recforge[ps]'"
# Two servers on one port would each get a part of the calls, and no error.
SERVER_OPTIONS = (("grpc.so_reuseport", 0),)

Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Security:
    tls: TlsConfig = field(default_factory=TlsConfig)
    token: str = field(default="", repr=False)

    def check(self, address: Address) -> None:
        """Checks that this address may be used.

        Raises:
            ValueError: It can be reached from elsewhere, and TLS or the token are missing.
        """
        missing = [] if self.tls.is_given else ["--tls.certificate, --tls.key and --tls.authority"]
        missing += [] if self.token else [f"--token-file (or {TOKEN_VARIABLE})"]
        if missing and not address.is_local:
            raise ValueError(
                f"{address}: expected TLS and a token for an address off this machine, got none: give "
                f"{' and '.join(missing)}, or use localhost:PORT or unix:/PATH"
            )

    def uses_tls(self, address: Address) -> bool:
        """Says whether TLS is spoken there."""
        return self.tls.is_given and not address.path  # the rights of its file guard a Unix socket


@dataclass(frozen=True, kw_only=True)
class ServerSecurity(_Security):
    """What a server asks of its callers; by default nothing, on this machine only.

    Attributes:
        tls: Files; callers off this machine must show a certificate of the same authority.
        token: That each call must bring, but those for health; empty: none.
    """

    def interceptors(self) -> list[grpc.ServerInterceptor]:
        """Gives what ``grpc.server`` needs to check tokens."""
        if not self.token:
            return []
        import_grpc()
        from parameter_server.security.token_check import TokenCheck

        return [TokenCheck(self.token)]

    def listen(self, server: grpc.Server, address: str) -> str:
        """Has a server listen, and gives the address with the port that was taken; make it with `SERVER_OPTIONS`.

        Raises:
            ValueError: See ``check``; or the certificate cannot be used.
            OSError: The address is in use, or not of this machine.
        """
        grpc = import_grpc()
        place = Address.parse(address)
        self.check(place)
        if place.path:
            _free_socket(place)
        try:
            if self.uses_tls(place):
                from parameter_server.security.certificates import read_own

                own = read_own(self.tls)
                asked = grpc.ssl_server_credentials([(own.key, own.certificate)], own.authority, True)
                port = server.add_secure_port(str(place), asked)
            else:
                port = server.add_insecure_port(str(place))
        except RuntimeError as error:
            raise OSError(_why_not_bound(place)) from error
        if place.path:
            os.chmod(place.path, stat.S_IRUSR | stat.S_IWUSR)
        return str(place.with_port(port))


@dataclass(frozen=True, kw_only=True)
class ClientSecurity(_Security):
    """What a client shows and asks of servers; by default nothing, on this machine only.

    Attributes:
        tls: Files; the server's certificate must be of the same authority, and name the host that is asked for.
        token: Goes with each call; empty: none.
    """

    def open_channel(self, address: str, options: Options = ()) -> grpc.Channel:
        """Opens a channel whose calls bring the token by themselves.

        Raises:
            ValueError: See ``check``; or the certificate cannot be used.
        """
        grpc = import_grpc()
        place = Address.parse(address)
        self.check(place)
        if self.uses_tls(place):
            from parameter_server.security.certificates import read_own

            own = read_own(self.tls)
            shown = grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
            channel = grpc.secure_channel(str(place), shown, options)
        else:
            channel = grpc.insecure_channel(str(place), options)
        if not self.token:
            return channel
        from parameter_server.security.token_check import TokenBringer, token_metadata

        return grpc.intercept_channel(channel, TokenBringer(token_metadata(self.token)))


def read_token(file: Path | None) -> str:
    """Reads the run's token from a file, else from RECFORGE_TOKEN; empty where there is none.

    Raises:
        ValueError: It cannot be read, is too short, or has characters that do not travel; it is never shown itself.
    """
    place = f"--token-file {file}" if file else TOKEN_VARIABLE
    try:
        token = (file.read_text(encoding="utf-8") if file else os.environ.get(TOKEN_VARIABLE, "")).strip()
    except UnicodeDecodeError:
        token = "\0"
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ValueError(f"{place}: expected a file that can be read, got none: {why}") from error
    if not token and not file:
        return ""
    if len(token) < MIN_TOKEN or not all("!" <= letter <= "~" for letter in token):
        raise ValueError(
            f"{place}: expected at least {MIN_TOKEN} printable ASCII characters without blanks, as "
            "`openssl rand -hex 32` gives them, got something else"
        )
    return token


def import_grpc() -> Any:
    """Imports gRPC.

    Raises:
        ValueError: It is not installed.
    """
    # Its log would tell once more, in many lines, what ends as one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import grpc
    except ModuleNotFoundError:
        raise ValueError(NO_GRPC) from None
    return grpc


def _free_socket(place: Address) -> None:
    """Removes what a killed server has left; gRPC would remove a living one's as well.

    Raises:
        OSError: Another process listens there, or something else lies there.
    """
    file = Path(place.path)
    if not file.parent.is_dir():
        raise OSError(f"{place}: expected a folder {file.parent}, got none")
    if not os.path.lexists(file):
        return
    if not file.is_socket():
        raise OSError(f"{place}: expected a socket or nothing there, got another file")
    with contextlib.suppress(ConnectionRefusedError):
        connect(place, 1.0).close()
        raise OSError(f"{place}: the address is in use by another process; choose another --address")
    file.unlink()


def _why_not_bound(place: Address) -> str:
    """Says why gRPC could not listen, which it only prints to the log."""
    import socket

    if place.path:
        return f"{place}: cannot listen there"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
    except OSError as error:
        return f"{place}: cannot listen there: {(error.strerror or str(error)).lower()}; choose another --address"
    return f"{place}: the address is in use by another process; choose another --address"

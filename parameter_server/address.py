"""Where a member listens: ``host:port``, or ``unix:/path`` on one machine."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

UNIX = "unix:"
MAX_PATH_BYTES = 107  # of a Unix socket, as Linux has it


@dataclass(frozen=True, kw_only=True)
class Address:
    """An address, taken apart.

    Attributes:
        host: Name or number; empty for a Unix socket.
        port: 0 lets the system choose.
        path: Of a Unix socket; empty for a host.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @staticmethod
    def parse(text: str, flag: str = "--address") -> Address:
        """Reads ``host:port``, ``[::1]:port`` or ``unix:/path``.

        Raises:
            ValueError: It is none of these, naming the flag.
        """
        if text.startswith(UNIX):
            path = text[len(UNIX) :]
            if not path or len(path.encode()) > MAX_PATH_BYTES:
                raise ValueError(
                    f"{flag}: expected a path of 1 to {MAX_PATH_BYTES} bytes for a Unix socket, got {text}"
                )
            return Address(path=path)
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
            raise ValueError(f"{flag}: expected HOST:PORT or unix:/PATH, got {text!r}")
        return Address(host=host, port=int(port))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it, whatever names are resolved to."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_anywhere(self) -> bool:
        """Whether it stands for all of a machine's addresses, and so for none that others could ask for."""
        try:
            return not self.path and ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False

    def with_port(self, port: int) -> Address:
        """Gives the same with a port, once the system has chosen one."""
        return self if self.path else Address(host=self.host, port=port)

    def __str__(self) -> str:
        if self.path:
            return UNIX + self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def connect(address: Address, timeout_seconds: float) -> socket.socket:
    """Opens a plain socket.

    Raises:
        OSError: Nobody listens there.
    """
    if not address.path:
        return socket.create_connection((address.host, address.port), timeout_seconds)
    opened = socket.socket(socket.AF_UNIX)
    try:
        opened.settimeout(timeout_seconds)
        opened.connect(address.path)
    except BaseException:
        opened.close()
        raise
    return opened

"""What the processes of a run can be told; a field's docstring is its flag's help. Nothing heavy is imported here."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from parameter_server.address import Address
from parameter_server.processes.logs import LogFormat
from parameter_server.processes.rows_service import ServerLimits
from parameter_server.security.security import ClientSecurity, ServerSecurity, read_token
from parameter_server.security.tls_config import TlsConfig


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How a process makes itself known to others of its run."""

    token_file: Path | None = None
    """File with the run's token, which all members must have; without it, RECFORGE_TOKEN of the environment."""
    tls: TlsConfig = field(default_factory=TlsConfig)

    @cached_property
    def token(self) -> str:
        """The token; empty without one. No flag holds it, as anybody may see a machine's command lines."""
        return read_token(self.token_file)

    @property
    def client_security(self) -> ClientSecurity:
        """What goes with calls to others."""
        return ClientSecurity(tls=self.tls, token=self.token)


@dataclass(frozen=True, kw_only=True)
class MemberConfig(ClientConfig):
    """A process that serves others."""

    address: str = "localhost:0"
    """Where to listen: HOST:PORT (port 0: any free one) or unix:/PATH. Off this machine TLS and a token are needed."""
    advertise: str | None = None
    """The address that others are told to use; needed where --address stands for all of this machine's."""
    limits: ServerLimits = field(default_factory=ServerLimits)
    metrics_port: int = 0
    """Port of the Prometheus metrics; 0 turns them off."""
    metrics_host: str = "127.0.0.1"
    """Where metrics may be asked for; they are neither encrypted nor guarded by the token."""
    log_format: LogFormat = "text"
    """Of events on the standard error: text for people, json with all fields for programs."""

    def __post_init__(self) -> None:
        place = Address.parse(self.address)
        if self.advertise is not None:
            Address.parse(self.advertise, "--advertise")
        elif place.is_anywhere:
            raise ValueError(
                f"--advertise: expected the address that others use beside --address {self.address}, got none"
            )
        if not 0 <= self.metrics_port < 1 << 16:
            raise ValueError(f"--metrics-port: expected 0 to 65535, got {self.metrics_port}")

    @property
    def server_security(self) -> ServerSecurity:
        """What callers must show."""
        return ServerSecurity(tls=self.tls, token=self.token)

    def tell(self, taken: str) -> str:
        """Gives the address that others use, from the one that was taken: of a port 0, they differ."""
        if self.advertise is None:
            return taken
        told = Address.parse(self.advertise)
        return str(told if told.port or told.path else told.with_port(Address.parse(taken).port))


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig(MemberConfig):
    """The process that knows who is there, who holds which rows, and which data are trained."""

    folder: Path
    """Of its state, the positions of snapshots included; a new coordinator goes on where an earlier one has ended."""
    shards: int = 1
    """How many shards the run waits for at its beginning; more may join at any time."""
    restore: str = ""
    """Name of a snapshot (`recforge ps status --json` lists them): goes back to the data's position then; later data
    are trained again, and shards leave out what they have of it. Refused while trainers live; give it once."""
    forget_shards: tuple[str, ...] = ()
    """Names of all shards that hold rows and have ended for good. As many new ones as --shards says take their place,
    by other names, each of them with --restore-from and the folders of all old ones."""
    lease_seconds: float = 10.0
    """A member that was not heard of for so long counts as dead, and others get its work."""
    snapshot_seconds: float = 300.0
    """A snapshot of all shards is taken so often, where the run's durability asks for any; 0: only when asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self.shards, "--shards")
        above(0, self.lease_seconds, "--lease-seconds")
        at_least(0, self.snapshot_seconds, "--snapshot-seconds")


@dataclass(frozen=True, kw_only=True)
class ShardConfig(MemberConfig):
    """A process that holds rows."""

    coordinator: str
    """Address of the run's coordinator."""
    name: str = ""
    """By which the shard gets its number back when it is started again; by default that of its folder."""
    folder: Path | None = None
    """Snapshots and journal. Needed unless the run's durability is none."""
    restore_from: tuple[Path, ...] = ()
    """Folders of all shards that the run had before, however many, on the same run's coordinator, which was started
    with --forget-shards: this new shard takes its share of their rows. They are only read; remove them when all new
    shards are ready. To say it again changes nothing."""
    journal_sync: Literal["group", "none"] = "group"
    """group: a push is acknowledged once it is on the disk; none: once the system has it, which power cuts undo."""
    eviction_seconds: float = 30.0
    """Rows that are to go by age or number are looked for so often."""
    connect_seconds: float = 60.0
    """How long to wait for the coordinator at the start."""

    @property
    def called(self) -> str:
        """The name: the given one, or that of the folder, or one that no other process on this machine has."""
        if self.name:
            return self.name
        return self.folder.resolve().name if self.folder is not None else f"{socket.gethostname()}-{os.getpid()}"

    def __post_init__(self) -> None:
        super().__post_init__()
        Address.parse(self.coordinator, "--coordinator")
        above(0, self.eviction_seconds, "--eviction-seconds")
        above(0, self.connect_seconds, "--connect-seconds")


def at_least(least: float, number: float, flag: str) -> None:
    """Checks a number.

    Raises:
        ValueError: It is smaller.
    """
    if not number >= least:
        raise ValueError(f"{flag}: expected at least {least}, got {number}")


def above(limit: float, number: float, flag: str) -> None:
    """Checks a number.

    Raises:
        ValueError: It is not larger.
    """
    if not number > limit:
        raise ValueError(f"{flag}: expected a number above {limit}, got {number}")

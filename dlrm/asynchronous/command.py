"""`recforge ps`: finds the process or question about parameter servers that is asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from dlrm.cli import Command, parse, status_of
from dlrm.distributed.place import stop_with_launcher

if TYPE_CHECKING:
    from parameter_server.processes.config import MemberConfig
    from parameter_server.processes.logs import EventFormatter

    Member = TypeVar("Member", bound=MemberConfig)

PARTS: dict[str, Command] = {
    "up": Command("a whole run on this machine: starts, watches and stops all others", "dlrm.asynchronous.up:run_up"),
    "coordinator": Command("who takes part, and who has which rows and data", f"{__name__}:run_coordinator"),
    "shard": Command("holds rows, answers pulls and applies pushes", f"{__name__}:run_shard"),
    "trainer": Command("computes, with rows from the shards", "dlrm.asynchronous.train:run_trainer"),
    "status": Command("say how a run goes", f"{__name__}:run_status"),
    "snapshot": Command("have all shards save what they hold", f"{__name__}:run_snapshot"),
    "drain": Command("empty a shard, so that it may go", f"{__name__}:run_drain"),
    "certificates": Command("make certificates for tests", f"{__name__}:run_certificates"),
}


def run_ps(argv: list[str], parts: Mapping[str, Command] = PARTS) -> int:
    """Run the part that `argv` names, then its flags.

    Args:
        argv: arguments.
        parts: those that there are, by name.

    Raises:
        ValueError: there is no such part.
    """
    stop_with_launcher()
    if not argv or argv[0].startswith("-"):
        print(_usage(parts))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    if argv[0] not in parts:
        raise ValueError(f"recforge ps: expected one of {', '.join(parts)}, got '{argv[0]}'")
    # Its log would tell once more, in many lines, what ends as one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return parts[argv[0]].run(argv[1:])


def run_coordinator(argv: list[str]) -> int:
    """Be the coordinator of a run."""
    from parameter_server.processes.config import CoordinatorConfig

    config = parse(CoordinatorConfig, argv, program="recforge ps coordinator")
    from parameter_server.processes.coordinator_process import serve

    return _serve(serve, config, "coordinator")


def run_shard(argv: list[str]) -> int:
    """Be a shard of a run."""
    from parameter_server.processes.config import ShardConfig

    config = parse(ShardConfig, argv, program="recforge ps shard")
    from parameter_server.processes.shard_process import serve

    return _serve(serve, config, config.called)


def run_status(argv: list[str]) -> int:
    """Say how a run goes."""
    from parameter_server.processes.command import StatusConfig, tell_status

    return tell_status(parse(StatusConfig, argv, program="recforge ps status"))


def run_snapshot(argv: list[str]) -> int:
    """Have a snapshot taken."""
    from parameter_server.processes.command import SnapshotConfig, take_snapshot

    return take_snapshot(parse(SnapshotConfig, argv, program="recforge ps snapshot"))


def run_drain(argv: list[str]) -> int:
    """Have a shard emptied."""
    from parameter_server.processes.command import DrainConfig, drain_shard

    return drain_shard(parse(DrainConfig, argv, program="recforge ps drain"))


def run_certificates(argv: list[str]) -> int:
    """Make certificates for tests."""
    from parameter_server.processes.command import CertificatesConfig, make_certificates

    return make_certificates(parse(CertificatesConfig, argv, program="recforge ps certificates"))


def _serve(serve: Callable[[Member, EventFormatter], None], config: Member, name: str) -> int:
    """Run a process; where its events are JSON, an error that ends it is one too."""
    from parameter_server.processes.logs import events_written

    with events_written(config.log_format, name) as events:
        try:
            serve(config, events)
        except (Exception, KeyboardInterrupt) as error:
            if config.log_format == "text" or os.environ.get("RECFORGE_TRACEBACK") == "1":
                raise
            logging.getLogger(__name__).error("%s", error, extra={"event": "failed", "error": type(error).__name__})
            return status_of(error)
    return 0


def _usage(parts: Mapping[str, Command]) -> str:
    width = max(map(len, parts))
    return "\n".join(
        [
            "usage: recforge ps PART ...",
            "",
            "Train against parameter servers: tables on shards, trainers that do not wait for one another.",
            "",
            *(f"  {name:{width}}  {part.help}" for name, part in parts.items()),
            "",
            "`recforge ps PART --help` lists every flag of a part.",
        ]
    )

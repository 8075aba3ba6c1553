"""`recforge ps up`: a whole run on one machine, that is coordinator, shards and trainers, started and seen after."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dlrm.asynchronous.crew import Crew, Role
from dlrm.asynchronous.crew_progress import CrewProgress
from dlrm.asynchronous.served_clicks import SERVED_CLICKS
from dlrm.asynchronous.served_kind import ServedKind, choose_kind, list_recipes
from dlrm.cli import parse
from dlrm.this_machine import count_cores
from dlrm.training.kind import SHORT, name_run
from parameter_server.address import MAX_PATH_BYTES
from parameter_server.processes.stop_signal import StopSignal

MEMBERS, COORDINATOR, SHARDS = "members", "coordinator", "shards"
SHARDS_ORDER = 1
SUMMARY, ENDED = "summary.json", "ended"
LOOK_SECONDS = 0.2
TRAINERS = "--servers.trainers"
OWN_FLAGS = ("--servers.coordinator", "--servers.name")


@dataclass(frozen=True, kw_only=True)
class UpConfig:
    """How many processes there are.

    Attributes:
        shards: that hold rows.
        trainers: that compute.
        max_restarts: of each process.
        snapshot_seconds: between two snapshots.
        metrics_port: of the coordinator; shards have the ports that follow; 0 is none.
    """

    shards: int = 2
    trainers: int = 2
    max_restarts: int = 3
    snapshot_seconds: float = 300.0
    metrics_port: int = 0

    def __post_init__(self) -> None:
        for name, least in (("shards", 1), ("trainers", 1), ("max_restarts", 0), ("snapshot_seconds", 0)):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: expected at least {least}, got {getattr(self, name)}")


def run_up(argv: list[str], kinds: Sequence[ServedKind] = (SERVED_CLICKS,)) -> int:
    """Start, watch and stop what `argv` asks for: a recipe or a configuration file, then flags."""
    if not argv or argv[0].startswith("-"):
        print(_usage(kinds))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    served = choose_kind(kinds, argv[0])
    recipe = served.kind.find(argv[0])
    config, rest = read_flags(argv[1:])
    if "-h" in rest or "--help" in rest:
        print(_usage(kinds))
        return 0
    trained = parse(
        served.config,
        rest,
        program=f"recforge ps up {argv[0]}",
        description=recipe.help,
        default=served.default(recipe.config),
        short=SHORT,
    )
    if given := [flag for flag in OWN_FLAGS if any(part.partition("=")[0] == flag for part in rest)]:
        raise ValueError(
            f"{given[0]}: expected none, as all members are started here; use `recforge ps trainer` for it"
        )
    output = trained.output or Path(name_run(argv[0]))
    print(f"recforge: run {output}", file=sys.stderr)
    served.check(trained)
    for note in served.notes(trained):
        print(f"recforge: {note}", file=sys.stderr)
    from dlrm.asynchronous.branching import check_output

    check_output(output)
    served.provide(recipe, trained)  # with its usual progress bar, so that no trainer waits for another's
    shards = choose_shards(config, output, branches=trained.branch_from is not None)
    with tempfile.TemporaryDirectory(prefix="recforge-", dir=_short_folder()) as sockets:
        trainer = [argv[0], *rest]
        trainer += [] if trained.step.threads is not None else ["--step.threads", str(_threads(config.trainers))]
        trainer += [] if any(TRAINERS in part for part in rest) else [TRAINERS, str(config.trainers)]
        roles = plan_roles(
            config,
            trainer,
            output,
            Path(sockets),
            durability=trained.servers.durability,
            shards=shards,
            module=served.kind.module,
        )
        watch(roles, config, output, Path(sockets))
    if (output / SUMMARY).is_file():
        print(served.kind.describe(json.loads((output / SUMMARY).read_text(encoding="utf-8"))))
    return 0


def read_flags(argv: Sequence[str]) -> tuple[UpConfig, list[str]]:
    """Read the flags of this command, and return those that are for trainers.

    Raises:
        ValueError: a value is none.
    """
    parser = _Parser(prog="recforge ps up", add_help=False, allow_abbrev=False)
    for name, default in vars(UpConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    known, rest = parser.parse_known_args(argv)
    return UpConfig(**vars(known)), rest


def choose_shards(config: UpConfig, output: Path, *, branches: bool = False) -> tuple[str, ...]:
    """Say which shards to start: of a run that was begun before, all that hold rows, to go on with as many as asked.

    Args:
        config: how many are asked for.
        output: the run's folder.
        branches: whether the run begins with rows of another one, which are loaded once.

    Raises:
        ValueError: the run cannot go on.
    """
    from parameter_server.coordinator.going_on import go_on
    from parameter_server.processes.coordinator_process import STATE

    ended = output / MEMBERS / ENDED
    names = _name_shards(config)
    found = go_on(output / COORDINATOR / STATE, names, goes_back=not ended.is_file())
    ended.unlink(missing_ok=True)
    if found.durability == "none" and (found.completed_chunks or (branches and found.has_begun)):
        raise ValueError(
            f"--output {output}: expected a run that can go on, got one whose rows were not kept (--servers.durability "
            "none); begin another one elsewhere, with --servers.durability journal or snapshot if it is to go on"
        )
    if found.durability not in ("", "none"):
        for name in found.holding:
            if not (output / SHARDS / name).is_dir():
                raise ValueError(
                    f"--output {output}: expected the rows of {name} in {SHARDS}/{name}, got no such folder"
                )
    if found.snapshot is not None:
        print(f"recforge: goes on from snapshot {found.snapshot}, as the run was cut off", file=sys.stderr)
    for name in found.leaving:
        print(f"recforge: the rows of {name} move to the other shards; its folder may go then", file=sys.stderr)
    return found.shards


def plan_roles(
    config: UpConfig,
    trainer: Sequence[str],
    output: Path,
    sockets: Path,
    *,
    durability: str,
    shards: Sequence[str] | None = None,
    module: str = "dlrm",
) -> list[Role]:
    """Say which processes there are.

    Args:
        config: how many.
        trainer: recipe and flags of each trainer.
        output: the run's folder.
        sockets: a folder of this user alone, for Unix sockets.
        durability: of the run.
        shards: names of those to start, by default as many as `config` says.
        module: whose command trainers are.
    """
    coordinator = address_in(sockets)

    def metrics(number: int) -> list[str]:
        return ["--metrics-port", str(config.metrics_port + number)] if config.metrics_port else []

    program = ["--folder", str(output / COORDINATOR), "--address", coordinator, "--shards", str(config.shards)]
    program += ["--snapshot-seconds", str(config.snapshot_seconds), *metrics(0)]
    roles = [Role(name="coordinator", program=("-m", "dlrm", "ps", "coordinator", *program), order=2)]
    for number, name in enumerate(_name_shards(config) if shards is None else shards):
        program = ["--coordinator", coordinator, "--address", f"unix:{sockets / str(number)}", "--name", name]
        program += [] if durability == "none" else ["--folder", str(output / SHARDS / name)]
        roles.append(
            Role(name=name, program=("-m", "dlrm", "ps", "shard", *program, *metrics(1 + number)), order=SHARDS_ORDER)
        )
    for number in range(config.trainers):
        name = f"trainer-{number}"
        program = [*trainer, "--output", str(output), "--servers.coordinator", coordinator, "--servers.name", name]
        roles.append(Role(name=name, program=("-m", module, "ps", "trainer", *program), order=0, ends_by_itself=True))
    return roles


def watch(roles: Sequence[Role], config: UpConfig, output: Path, sockets: Path) -> None:
    """See after processes until the trainers are done, with one progress display for all.

    Raises:
        ValueError: one cannot go on.
        KeyboardInterrupt: somebody has asked to stop; all have ended in good order.
    """
    with (
        StopSignal() as stop,
        CrewProgress(address_in(sockets), shards=sum(role.order == SHARDS_ORDER for role in roles)) as progress,
        Crew(roles, output / MEMBERS, max_restarts=config.max_restarts, say=progress.say) as crew,
    ):
        while not crew.look():
            if stop.wait(LOOK_SECONDS):
                progress.say("all members are asked to save what they hold, and to end")
                crew.stop()
                _note_end(crew, output)
                raise KeyboardInterrupt(f"; the same command with --output {output} continues")
            progress.show()
        progress.show(at_once=True)
        crew.stop()
        for failure in crew.failures():
            raise ValueError(failure)
        _note_end(crew, output)


def _note_end(crew: Crew, output: Path) -> None:
    """Take down that all have saved what they held, so that nothing has to be done again."""
    if not any(crew.failures()):
        (output / MEMBERS / ENDED).touch()


def address_in(sockets: Path) -> str:
    """Return the coordinator's address in a folder of sockets."""
    return f"unix:{sockets / 'c'}"


def _name_shards(config: UpConfig) -> list[str]:
    return [f"shard-{number}" for number in range(config.shards)]


def _threads(trainers: int) -> int:
    return max(1, count_cores() // trainers)


def _short_folder() -> str | None:
    """Return where paths of sockets are short enough; None is where temporary files usually are."""
    usual = tempfile.gettempdir()
    return None if len(usual.encode()) < MAX_PATH_BYTES - 40 else "/tmp"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"recforge ps up: {message}")


def _usage(kinds: Sequence[ServedKind]) -> str:
    config = UpConfig()
    return "\n".join(
        [
            "usage: recforge ps up RECIPE|CONFIG.toml [--shards N] [--trainers N] [--output RUN] [flags of a trainer]",
            "",
            f"  --shards N            processes that hold rows ({config.shards}); a run may go on with others",
            f"  --trainers N          processes that compute ({config.trainers})",
            f"  --max-restarts N      of each process that is lost ({config.max_restarts})",
            f"  --snapshot-seconds S  between two snapshots ({config.snapshot_seconds:g})",
            "  --metrics-port PORT   Prometheus metrics of the coordinator; shards have the ports after it (none)",
            "",
            *list_recipes(kinds),
            "",
            "`recforge ps trainer RECIPE --help` lists all other flags. What members print is in RUN/members.",
        ]
    )

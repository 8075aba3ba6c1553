"""The command line: a table of commands, each imported when it is called, and one line for every error."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TextIO, TypeVar

Config = TypeVar("Config")
ERROR, INTERRUPTED = 2, 130
LOST = 1  # another process, or the network: the same again may succeed


@dataclass(frozen=True)
class Command:
    """A command: its line in `--help`, and `module:function`, which takes the arguments and returns an exit status."""

    help: str
    target: str

    def run(self, argv: list[str]) -> int:
        """Import the command and run it."""
        module, function = self.target.split(":")
        entry: Callable[[list[str]], int] = getattr(import_module(module), function)
        return entry(argv)


COMMANDS: dict[str, Command] = {
    "init": Command("look at a data file and write a configuration for it", "dlrm.data.commands:run_init"),
    "prepare": Command("turn raw files into a prepared dataset", "dlrm.data.commands:run_prepare"),
    "train": Command("train a recipe, or what a configuration file describes", "dlrm.training.command:run_train"),
    "plan": Command(
        "say where tables would lie on many ranks, and how fast a step would be", "dlrm.planning.command:run_plan"
    ),
    "study": Command(
        "answer a question that takes many runs: the batch size, the learning rate",
        "dlrm.analysis.study.command:run_study",
    ),
    "ps": Command("train against parameter servers: coordinator, shards, trainers", "dlrm.asynchronous.command:run_ps"),
    "report": Command("write a run as one HTML page", "dlrm.analysis.report:run_report"),
}


def run(commands: Mapping[str, Command], argv: Sequence[str] | None = None, *, version: str = "") -> int:
    """Run the command that `argv` names, and turn whatever goes wrong into one line and an exit status.

    Set RECFORGE_TRACEBACK=1 to see the whole traceback instead.
    """
    parser = argparse.ArgumentParser(prog="recforge", description="Train models that are mostly embedding tables.")
    parser.add_argument("--version", action="version", version=f"recforge {version}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in commands.items():
        subparsers.add_parser(name, help=command.help, add_help=False, prefix_chars="\0")
    arguments = list(sys.argv[1:] if argv is None else argv)
    known, _ = parser.parse_known_args(arguments[:1])
    if os.environ.get("RECFORGE_TRACEBACK") == "1":
        return commands[known.command].run(arguments[1:])
    status = 0
    try:
        with _reader_may_leave():
            status = commands[known.command].run(arguments[1:])
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            line = f"interrupted {error}".replace(" ;", ";", 1).rstrip()
        elif isinstance(error, ValueError | OSError):
            line = str(error)
        else:
            line = f"{type(error).__name__}: {error} (RECFORGE_TRACEBACK=1 shows where)"
        return _complain(line, status_of(error))
    return status


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Take it for no error that who reads the output has seen enough, as `head`; a broken pipe to a rank is one."""
    try:
        yield
        if sys.stdout is not None:  # as it is when a shell has closed it
            sys.stdout.flush()
    except BrokenPipeError:
        if _is_read(sys.stdout):
            raise
    finally:
        if sys.stdout is not None and not _is_read(sys.stdout):
            # What is left would be written at exit, and fail there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_read(output: TextIO) -> bool:
    """Say whether somebody still reads an output; one that is no file of the system always is."""
    try:
        number = output.fileno()
    except (OSError, ValueError):
        return True
    poll = select.poll()
    poll.register(number, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def status_of(error: BaseException) -> int:
    """Return the exit status for an error: whether the user stopped, can cure it, or it is unexpected."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ConnectionError):
        return LOST
    return ERROR if isinstance(error, ValueError | OSError) else 1


def parse(
    config: type[Config],
    argv: Sequence[str],
    *,
    program: str,
    description: str = "",
    default: Config | None = None,
    short: Mapping[str, str] | None = None,
) -> Config:
    """Make a configuration from flags; whatever is wrong with them is one line, as every other error.

    Args:
        config: a dataclass.
        argv: the flags.
        program: named in the help text.
        description: shown there.
        default: where values come from that no flag gives.
        short: shorter names of flags, and the whole ones.

    Raises:
        ValueError: a flag does not exist, or its value is not accepted.
    """
    import tyro

    start: dict[str, Any] = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = _write_out(argv, short or {})
            made: Config = tyro.cli(config, prog=program, description=description or None, args=args, **start)
            return made
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_unbox(complaint.getvalue())) from None


def _write_out(argv: Sequence[str], short: Mapping[str, str]) -> list[str]:
    """Replace the short names of flags, given as `--name value` or `--name=value`."""
    parts = [(argument.partition("="), argument) for argument in argv]
    return [short.get(name.replace("_", "-"), name) + equals + value for (name, equals, value), _ in parts]


def _unbox(complaint: str) -> str:
    """Return what tyro says in a box, drawn with lines or with dashes, as one line without the title.

    A configuration that several groups of flags fill names them all, `--a.name / --b.name`; tyro knows which it was.
    """
    _, *lines = complaint.strip().splitlines()
    words = " ".join(re.sub("[\u2500-\u257f]|-{4,}", " ", " ".join(lines)).split())
    words = re.sub(r"(?<![.:]) (?=For full helptext|Argument helptext)", ". ", words)
    if (parsing := re.match(r"Error parsing ([\w.-]+): ", words)) is None:
        return words
    all_of_them = r"--[\w-]+\.([\w-]+)(?: / --[\w-]+\.\1)+"
    return re.sub(all_of_them, rf"--{parsing[1]}.\1", words[parsing.end() :])


def _complain(message: str, status: int) -> int:
    print(f"recforge: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of this package's commands (`python -m dlrm`)."""
    return run(COMMANDS, argv)

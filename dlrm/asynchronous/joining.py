"""How a trainer becomes a member of a run: it says whom it waits for, and which of its flags are others than theirs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dlrm.asynchronous.membership import Membership
from parameter_server.control.coordinator_client import CoordinatorClient
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError

TELL_SECONDS = 2.0
MAX_NAMED = 4
_FLAGS = {
    "seed": "--seed",
    "tables": "--model.dim, --tables or --small-tables",
    "lanes": "--servers.lanes",
    "staleness": "--servers.staleness",
    "durability": "--servers.durability",
    "dense": "--dense-average.mode",
    "samples": "--epochs",
    "epoch_samples": "--data",
    "first_sample": "--branch-from and --branch-at",
    "batch_size": "--servers.trainers (`up`: --trainers) or --global-batch-size",
    "chunk_batches": "--servers.chunk-batches",
    "alone_samples": "--servers.alone-samples",
}
_FLAGS_OF_SETTINGS = {"data": "--data", "dense_options": "--dense or --dense-average"}
_UNITS = {"batch_size": " samples per trainer and step"}


def join_run(client: CoordinatorClient, name: str, described: RunDescription, address: str) -> Membership:
    """Register a trainer.

    Args:
        client: of the coordinator.
        name: of the trainer.
        described: the run as this trainer has it.
        address: of the coordinator, as people know it.

    Raises:
        ValueError: the coordinator has another run, and flags that differ are named; or see `Membership`.
        ConnectionError: it cannot be reached.
    """
    try:
        with telling(f"{name}: waiting for the coordinator at {address}"):
            return Membership(client, name, described)
    except RefusedError as error:
        if error.refusal is not Refusal.FAILED_PRECONDITION:
            raise
        others = RunDescription.from_json(client.describe())
        if not (differences := list(describe_differences(others, described))):
            raise
        more = len(differences) - MAX_NAMED
        raise ValueError(
            f"expected the settings of this run, got others: {'; '.join(differences[:MAX_NAMED])}"
            f"{f'; and {more} more' if more > 0 else ''}; begin another run in another --output to change them"
        ) from error


def describe_differences(run: RunDescription, given: RunDescription) -> Iterator[str]:
    """Yield for each setting in which a trainer differs its flag, the run's value, and the trainer's."""
    different = run.differences(given)
    settings = [
        key
        for key in sorted(run.settings.keys() | given.settings.keys())
        if run.settings.get(key) != given.settings.get(key)
    ]
    for field in different:
        if field == "settings" or (field == "samples" and {"epochs", "data"} & set(settings)):
            continue  # told by what they follow from
        ours, theirs = getattr(run, field), getattr(given, field)
        yield f"{_FLAGS.get(field, field)}: {_tell(ours, theirs, _UNITS.get(field, ''))}"
    for key in settings:
        flag = _FLAGS_OF_SETTINGS.get(key, f"--{key.replace('_', '-')}")
        yield f"{flag}: {_tell(run.settings.get(key), given.settings.get(key))}"


def _tell(ours: Any, theirs: Any, unit: str = "") -> str:
    told = [f"{it}" for it in (ours, theirs)]
    if any(len(words) > 60 for words in told):
        return "others than those of the run"
    return f"expected {told[0]}{unit}, got {told[1]}"


@contextmanager
def telling(line: str, seconds: float | None = None) -> Iterator[None]:
    """Print a line if what is done within takes longer than so many seconds."""

    def tell() -> None:
        print(f"recforge: {line}", file=sys.stderr, flush=True)

    timer = threading.Timer(TELL_SECONDS if seconds is None else seconds, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()

"""Limits on what members send to the coordinator: nothing grows with what a stranger says."""

from __future__ import annotations

import math
from collections.abc import Mapping

from parameter_server.coordinator.answers import ROLES
from parameter_server.coordinator.chunks import ChunkPlan
from parameter_server.description import RunDescription
from parameter_server.errors import wrong

MAX_NAME = 200
MAX_ADDRESS = 300
MAX_DESCRIPTION = 4 << 20
MAX_FACTS = 64
MAX_HOLDING = 64
MAX_TABLES = 1 << 16
MAX_CLOCK = 1 << 40
MAX_EPOCH = (1 << 32) - 1  # as frames have it
MAX_SHARDS = 1024
MAX_MEMBERS = 4096
MAX_MESSAGE_BYTES = 8 << 20


def check_member(role: str, name: str, address: str) -> None:
    """Checks what somebody registers with.

    Raises:
        RefusedError: With INVALID_ARGUMENT.
    """
    if role not in ROLES:
        raise wrong(f"role: expected one of {', '.join(ROLES)}, got {role[:20]!r}")
    check_text("name", name, MAX_NAME)
    if address or role == "shard":
        check_text("address", address, MAX_ADDRESS)


def check_text(what: str, text: str, limit: int) -> None:
    """Checks a text that is shown to people: not empty, not long, without characters that steer a terminal."""
    if not 1 <= len(text) <= limit:
        raise wrong(f"{what}: expected 1 to {limit} characters, got {len(text)}")
    if not text.isprintable():
        raise wrong(f"{what}: expected printable characters, got {text[:20]!r}")


def read_description(text: str | None) -> RunDescription | None:
    """Reads a description.

    Raises:
        RefusedError: With INVALID_ARGUMENT.
    """
    if text is None:
        return None
    if len(text) > MAX_DESCRIPTION:
        raise wrong(f"run description: expected at most {MAX_DESCRIPTION} characters, got {len(text)}")
    try:
        described = RunDescription.from_json(text)
        ChunkPlan(described)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise wrong(f"run description: expected one of this release; {error}") from error
    return described


def check_facts(facts: Mapping[str, float]) -> Mapping[str, float]:
    """Checks what a member tells of itself.

    Raises:
        RefusedError: With INVALID_ARGUMENT.
    """
    if len(facts) > MAX_FACTS:
        raise wrong(f"facts: expected at most {MAX_FACTS}, got {len(facts)}")
    for name, value in facts.items():
        check_text("name of a fact", name, MAX_NAME)
        if not math.isfinite(value):
            raise wrong(f"facts: expected a finite number of {name}, got {value}")
    return facts


def check_clock(clock: int) -> int:
    """Checks the number of a batch.

    Raises:
        RefusedError: With INVALID_ARGUMENT.
    """
    if not 0 <= clock <= MAX_CLOCK:
        raise wrong(f"clock: expected 0 to {MAX_CLOCK}, got {clock}")
    return clock

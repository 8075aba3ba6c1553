"""Refuses what a user has said where nothing makes use of it, rather than leave it without effect."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple


class Need(NamedTuple):
    """What some settings have no effect without.

    Attributes:
        expected: what they need, as a complaint says it.
        is_met: whether it is there.
        settings: their names, with dots between nested ones.
    """

    expected: str
    is_met: bool
    settings: tuple[str, ...]


def refuse_unused(told: object, usual: object, needs: Iterable[Need], prefix: str = "") -> None:
    """Check that no setting was changed that has no effect.

    Args:
        told: what holds the settings.
        usual: the same as it was before the user changed anything.
        needs: what settings need.
        prefix: of their flags.

    Raises:
        ValueError: naming the flag, and what would make use of it.
    """
    for need in needs:
        for name in () if need.is_met else need.settings:
            if (got := attrgetter(name)(told)) != attrgetter(name)(usual):
                flag = f"--{prefix}{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag}: expected {need.expected} beside it, as {got} does nothing otherwise; leave it out"
                )

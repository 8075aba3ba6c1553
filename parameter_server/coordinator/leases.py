"""Who is alive: members are heard of within their lease, or they stop counting and what they held goes to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from parameter_server.coordinator.answers import Role
from parameter_server.errors import Refusal, RefusedError


@dataclass
class Member:
    """A member that is alive.

    Attributes:
        heard: When, by the coordinator's clock.
        route_epoch: The newest that it says it uses.
        facts: What its last heartbeat told, for people.
    """

    number: int
    role: Role
    name: str
    address: str
    shard: int | None
    heard: float
    route_epoch: int = 0
    facts: dict[str, float] = field(default_factory=dict)


class Members:
    """The members whose leases have not expired, by number.

    Args:
        lease_seconds: How long a member may be silent.
        clock: Gives seconds that never go back; tests give their own.
    """

    def __init__(self, *, lease_seconds: float, clock: Callable[[], float]) -> None:
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._members: dict[int, Member] = {}

    def add(self, number: int, role: Role, name: str, address: str, shard: int | None) -> Member:
        """Adds a member that has been heard of now."""
        self._members[number] = Member(number, role, name, address, shard, self._clock())
        return self._members[number]

    def renew(self, number: int) -> Member | None:
        """Notes that a member was heard of; None where its lease has expired, or there never was one."""
        member = self._members.get(number)
        if member is not None:
            member.heard = self._clock()
        return member

    def require(self, number: int) -> Member:
        """Notes that a member was heard of.

        Raises:
            RefusedError: With FAILED_PRECONDITION: its lease has expired.
        """
        if (member := self.renew(number)) is None:
            raise RefusedError(Refusal.FAILED_PRECONDITION, f"unknown member {number}: register again")
        return member

    def expired(self) -> list[Member]:
        """Gives those that have been silent for longer than their lease."""
        limit = self._clock() - self.lease_seconds
        return [member for member in self._members.values() if member.heard < limit]

    def remove(self, number: int) -> Member | None:
        """Forgets a member."""
        return self._members.pop(number, None)

    def seconds_since_heard(self, member: Member) -> float:
        """Says for how long a member has been silent."""
        return self._clock() - member.heard

    def of(self, role: Role) -> list[Member]:
        """Gives the members of a role, in the order in which they registered."""
        return [member for member in self._members.values() if member.role == role]

    def all(self) -> list[Member]:
        """Gives all members, in the order in which they registered."""
        return list(self._members.values())

    def shard(self, number: int) -> Member | None:
        """Gives the living member that is a shard."""
        return next((member for member in self._members.values() if member.shard == number), None)

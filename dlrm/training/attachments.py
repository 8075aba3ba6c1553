"""The named points at which whatever steers or watches a run takes part in it, so that the loop itself stays short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from dlrm.batch import Batch
from dlrm.training.problem import Values


class Moment(NamedTuple):
    """A step, as those see it who take part in it.

    Attributes:
        batch: this rank's share of it, which may be empty.
        samples: trained before it, over all ranks.
        global_size: samples of it, over all ranks.
        batch_size: in force; the last batch of an epoch may be smaller.
    """

    batch: Batch
    samples: int
    global_size: int
    batch_size: int


class Attachment:
    """Takes part in a run at the points whose methods it overrides; all are called on every rank.

    Attributes:
        name: of its state in checkpoints; one of a kind in a run.
    """

    name = ""

    def before_step(self, moment: Moment) -> None:
        """Learning rates are set and nothing has been computed yet."""

    def after_backward(self, moment: Moment) -> None:
        """Dense gradients are sums over ranks and not yet used; tables have updated their rows."""

    def after_step(self, moment: Moment, loss: float) -> None:
        """All weights are updated; `loss` is the mean over all ranks' samples."""

    def before_measuring(self) -> None:
        """An evaluation or a checkpoint follows."""

    def after_evaluation(self, values: Values, samples: int) -> None:
        """The valid split was measured after so many samples."""

    def factor(self, group: str) -> float:
        """Return what multiplies the learning rate of `dense`, `head`, `tables` or `small_tables` in the next step."""
        return 1.0

    def position(self, samples: float) -> float:
        """Return how far schedules have come in the next step, given the samples at its middle."""
        return samples

    def values(self) -> Mapping[str, float]:
        """Return what is logged with the training loss, by name."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """Return what a resumed run needs: tensors, numbers and texts in dicts, lists and tuples."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""


class Attachments(Attachment):
    """Several as one, in their order.

    Args:
        members: with different names.

    Raises:
        ValueError: two have one name.
    """

    def __init__(self, members: Sequence[Attachment] = ()) -> None:
        self.members = tuple(members)
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise ValueError(f"attachments: expected different names, got {', '.join(names)}")

    def before_step(self, moment: Moment) -> None:
        """See `Attachment`."""
        for member in self.members:
            member.before_step(moment)

    def after_backward(self, moment: Moment) -> None:
        """See `Attachment`."""
        for member in self.members:
            member.after_backward(moment)

    def after_step(self, moment: Moment, loss: float) -> None:
        """See `Attachment`."""
        for member in self.members:
            member.after_step(moment, loss)

    def before_measuring(self) -> None:
        """See `Attachment`."""
        for member in self.members:
            member.before_measuring()

    def after_evaluation(self, values: Values, samples: int) -> None:
        """See `Attachment`."""
        for member in self.members:
            member.after_evaluation(values, samples)

    def factor(self, group: str) -> float:
        """Return the product of all."""
        return prod(member.factor(group) for member in self.members)

    def position(self, samples: float) -> float:
        """Ask one after the other, each about what the one before it has said."""
        for member in self.members:
            samples = member.position(samples)
        return samples

    def values(self) -> dict[str, float]:
        """See `Attachment`."""
        return {name: value for member in self.members for name, value in member.values().items()}

    def state(self) -> dict[str, Any]:
        """Return each one's state, by name."""
        return {member.name: dict(member.state()) for member in self.members}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Give each its own; one that was not there before begins anew."""
        for member in self.members:
            if member.name in state:
                member.load_state(state[member.name])

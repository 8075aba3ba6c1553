"""Several optimizers that are one to whoever trains with them: each has its own param groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch.optim import Optimizer


class HybridOptimizer(Optimizer):
    """Optimizers of different kinds, each with some of a model's parameters, behind the interface of one.

    Its param groups are those of its members, one after the other, and its state is theirs: a learning rate that is
    set here is set there, and a saved state looks like that of any optimizer with as many groups. A member holds the
    state of its own parameters only, since some read or cast all that they hold when it is loaded or copied.

    Args:
        members: with different parameters. From now on they step, and are saved, as part of this one only.

    Raises:
        ValueError: There are none, or two have a parameter in common.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = tuple(members)
        groups = [group for member in self.members for group in member.param_groups]
        if not groups:
            raise ValueError("HybridOptimizer: expected at least one optimizer, got none")
        super().__init__([{"params": group["params"]} for group in groups], {})
        state = self.state
        for member in self.members:
            state.update(member.state)
        self.__setstate__({"state": state, "param_groups": groups})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Let every member take a step; ``closure`` evaluates the loss anew, once, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
            self.state.update(member.state)  # the entries that the step has made; the others are the same objects
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls it with the groups and the state that it has loaded, which are new objects.
        super().__setstate__(state)
        start = 0
        for member in self.members:
            end = start + len(member.param_groups)
            groups = self.param_groups[start:end]
            own = [param for group in groups for param in group["params"] if param in self.state]
            of_member = defaultdict(dict, {param: self.state[param] for param in own})
            member.__setstate__({"state": of_member, "param_groups": groups})
            start = end

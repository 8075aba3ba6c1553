"""What our dense optimizers have in common: a step may be given the closure that evaluates the loss anew."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import overload

import torch
from torch.optim import Optimizer


class ClosureOptimizer(Optimizer, ABC):
    """An optimizer whose subclass says how all parameters move."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; ``closure`` evaluates the loss anew and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._move_all()
        return loss

    @abstractmethod
    def _move_all(self) -> None:
        """Updates every parameter that has a gradient; gradients are not recorded."""

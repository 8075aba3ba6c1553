"""A loss as a function of one vector: what every tool here differentiates, walks along and asks for its Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dlrm.distributed.ranks import ALONE, Ranks


class Objective:
    """The mean loss over a fixed sample as a function of some of a module's weights, laid end to end as one vector.

    The Hessian's products are those of two backward passes, so every operator on the way must have a second derivative.
    Pooled look-ups of tables and the CPU's own kernel of dot products (float32) have none, and say so; give the pooled
    rows as constants, or rows as ordinary parameters, and weights in float64, whose small eigenvalues are not rounding.

    Args:
        task: `task(part)` gives the mean loss over the part's samples, a scalar; evaluated as it is, so put it in
            evaluation mode.
        parts: (part, its number of samples); one is in memory with its activations at a time. There may be none on a
            rank, if others have some.
        names: of the parameters that the vector holds; None takes all. Others are constants.
        ranks: each has its own parts; values and derivatives are those over all of them, the same on every rank, and
            every call is a collective one.

    Raises:
        ValueError: the module has no parameter of a name, or none at all.
    """

    def __init__(
        self,
        task: nn.Module,
        parts: Sequence[tuple[Any, int]],
        *,
        names: Sequence[str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        parameters = dict(task.named_parameters())
        unknown = [name for name in names or () if name not in parameters]
        if unknown or not parameters:
            raise ValueError(f"objective: expected names of parameters, got {', '.join(unknown) or 'a module of none'}")
        self.task, self.parts, self.ranks = task, list(parts), ranks
        self.shapes = {name: parameters[name].shape for name in (names or parameters)}
        self.samples = ranks.sum([float(sum(size for _, size in self.parts))])[0]

    @property
    def num_weights(self) -> int:
        """Length of the vector."""
        return sum(shape.numel() for shape in self.shapes.values())

    def weights(self) -> Tensor:
        """Return the module's weights now, [num_weights]."""
        parameters = dict(self.task.named_parameters())
        return torch.cat([parameters[name].detach().flatten() for name in self.shapes])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views of a vector [num_weights] in the parameters' shapes, by name."""
        flat = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), flat, strict=True)}

    @torch.no_grad()
    def value(self, at: Tensor) -> float:
        """Return the loss at a vector [num_weights]."""
        total = sum(share * float(self._loss(at, part)) for part, share in self._shares())
        return self.ranks.sum([total])[0]

    @torch.enable_grad()
    def gradient(self, at: Tensor) -> tuple[float, Tensor]:
        """Return the loss at a vector, and its gradient there, [num_weights]."""
        total = torch.zeros(1 + len(at), dtype=at.dtype, device=at.device)
        for part, share in self._shares():
            here = at.detach().requires_grad_()
            loss = self._loss(here, part)
            total[0] += share * loss.detach()
            total[1:] += share * _differentiate(loss, here)
        total = self._sum(total)
        return float(total[0]), total[1:]

    @torch.enable_grad()
    def hessian_product(self, at: Tensor, direction: Tensor) -> Tensor:
        """Return the Hessian at a vector times a direction, both [num_weights]."""
        total = torch.zeros_like(at)
        for part, share in self._shares():
            here = at.detach().requires_grad_()
            gradient = _differentiate(self._loss(here, part), here, again=True)
            total += share * _differentiate((gradient * direction).sum(), here)
        return self._sum(total)

    def _loss(self, at: Tensor, part: Any) -> Tensor:
        loss: Tensor = functional_call(self.task, self.split(at), (part,))
        return loss

    def _shares(self) -> Iterator[tuple[Any, float]]:
        for part, size in self.parts:
            if size:
                yield part, size / self.samples

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.ranks.sum_tensor(tensor).to(tensor.device)


def _differentiate(value: Tensor, at: Tensor, *, again: bool = False) -> Tensor:
    """Return the gradient, zeros where the value does not depend on `at`; `again` keeps it differentiable."""
    if not value.requires_grad:
        return torch.zeros_like(at)
    (gradient,) = torch.autograd.grad(value, at, create_graph=again, materialize_grads=True)
    return gradient

"""Lanczos' method: the ends of a symmetric matrix' spectrum, and where the rest lies, from a few of its products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlrm.diverged import DivergedError

Product = Callable[[Tensor], Tensor]
"""Multiplies a symmetric matrix by a vector [n]."""


@dataclass(frozen=True, kw_only=True)
class RitzValues:
    """What some steps from one starting vector say of a symmetric matrix.

    Attributes:
        values: approximate eigenvalues, [steps], ascending.
        weights: [steps], the starting vector's share in each; they sum to 1. With a random start, a weight estimates
            the share of all eigenvalues that lies near.
        errors: [steps]; an eigenvalue lies within so much of each value.
    """

    values: Tensor
    weights: Tensor
    errors: Tensor

    @property
    def smallest(self) -> tuple[float, float]:
        """The value at the lower end, and its error."""
        return float(self.values[0]), float(self.errors[0])

    @property
    def largest(self) -> tuple[float, float]:
        """The value at the upper end, and its error."""
        return float(self.values[-1]), float(self.errors[-1])


@torch.no_grad()
def lanczos(
    product: Product, start: Tensor, steps: int, *, until: Callable[[RitzValues], bool] | None = None
) -> RitzValues:
    """Project a symmetric matrix on the Krylov space of `start` and return the projection's eigenvalues.

    Every new vector is made orthogonal to all before it, twice: without that, rounding brings back directions that
    have been found already, as further copies of their eigenvalues (Parlett 1998, "The Symmetric Eigenvalue Problem",
    chapter 13). Ends early where the space is exhausted; the values are exact then.

    Args:
        product: of the matrix, which is not changed in between; called at most `steps` times.
        start: [n], not zero; the basis takes `steps * n` numbers of its type.
        steps: at most n of them are taken.
        until: asked after every step whether what is known by now is enough.

    Raises:
        DivergedError: a product is not finite.
        ValueError: fewer than one step, or a start of zeros.
    """
    norm = float(start.norm())
    if steps < 1 or not norm > 0:
        raise ValueError(f"lanczos: expected at least 1 step and a start that is not zero, got {steps} and norm {norm}")
    steps = min(steps, len(start))
    basis = start.new_empty(steps, len(start))
    basis[0] = start / norm
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        following = product(basis[step]).clone()
        diagonal.append(float(torch.dot(basis[step], following)))
        for _ in range(2):
            known = basis[: step + 1]
            following -= known.T @ (known @ following)
        beside.append(float(following.norm()))
        if not (math.isfinite(diagonal[-1]) and math.isfinite(beside[-1])):
            raise DivergedError(f"lanczos: expected products of finite numbers, got others in step {step + 1}")
        is_exhausted = beside[-1] <= 1e2 * torch.finfo(start.dtype).eps * max(map(abs, [*diagonal, *beside]))
        if is_exhausted or step + 1 == steps or (until is not None and until(_ritz(diagonal, beside))):
            break
        basis[step + 1] = following / beside[-1]
    return _ritz(diagonal, beside)


def _ritz(diagonal: list[float], beside: list[float]) -> RitzValues:
    off = torch.tensor(beside[:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return RitzValues(values=values, weights=vectors[0].square(), errors=beside[-1] * vectors[-1].abs())


def random_start(num_weights: int, seed: int, like: Tensor) -> Tensor:
    """Draw signs (a Rademacher vector), [num_weights], of the type and on the device of `like`; alike on every rank."""
    signs = torch.randint(0, 2, (num_weights,), generator=torch.Generator().manual_seed(seed))
    return (2 * signs - 1).to(like.dtype).to(like.device)

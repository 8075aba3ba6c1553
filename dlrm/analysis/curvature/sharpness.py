"""Sharpness: how much the loss can rise within a small box around a solution, in percent of the loss plus one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlrm.analysis.curvature.objective import Objective

PERCENT = 100.0
BESIDE = 0.01  # of the way to the corner


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """The highest loss that was found in the box.

    Attributes:
        percent: 100 * (highest - start) / (1 + start).
        start: the loss at the solution.
        highest: within the box.
        evaluations: of the loss and its gradient that it took.
    """

    percent: float
    start: float
    highest: float
    evaluations: int


def measure_sharpness(
    objective: Objective,
    at: Tensor,
    *,
    reach: float = 1e-3,
    subspace: int | None = None,
    iterations: int = 10,
    seed: int = 0,
) -> Sharpness:
    """Maximise the loss over a box by a bounded L-BFGS (Keskar et al. 2017, arXiv:1609.04836, section 2.2.2).

    With z the way within the box and A the identity or a random [n, subspace] with columns of length 1, it is the
    maximum of f(w + A z) over |z_i| <= reach * (|(A^+ w)_i| + 1). Two searches, one from beside the solution and one
    from the corner to which the gradient points there, with few iterations: a lower bound, and exact where that corner
    is the maximum. It depends on how weights are scaled, which layers may change without changing what they compute
    (Dinh et al. 2017, arXiv:1703.04933): compare the same architecture only.

    Args:
        objective: the loss f.
        at: the solution w, [num_weights].
        reach: the box' size: 1e-3 and 5e-4 in the paper.
        subspace: dimensions of a random subspace (100 in the paper), which takes as many vectors of memory; None is
            the full space.
        iterations: of L-BFGS-B, of each search.
        seed: of the subspace, and of the way to leave a point where the gradient is zero.

    Raises:
        ValueError: scipy is missing, or a number is out of range.
    """
    if not reach > 0 or iterations < 1 or (subspace is not None and subspace < 1):
        raise ValueError(f"sharpness: expected numbers above 0, got reach {reach}, {iterations}, {subspace}")
    minimize = _load_scipy()
    generator = torch.Generator().manual_seed(seed)
    basis = _draw_basis(at, subspace, generator)
    box = reach * ((at if basis is None else _coordinates(basis, at)).abs() + 1)
    found: list[float] = []

    def fall(way: Any) -> tuple[float, Any]:
        """Give what L-BFGS-B minimises, minus the loss, and its gradient."""
        inside = torch.as_tensor(way, dtype=at.dtype, device=at.device)
        value, gradient = objective.gradient(at + (inside if basis is None else basis @ inside))
        found.append(value)
        return -value, -(gradient if basis is None else basis.T @ gradient).double().cpu().numpy()

    _, downhill = fall(torch.zeros(len(box), dtype=torch.float64).numpy())
    # From the solution itself, a gradient of zero would end the search before it began.
    signs = -torch.as_tensor(downhill).sign()
    drawn = 2.0 * torch.randint(0, 2, signs.shape, generator=generator) - 1
    limit = box.double().cpu()
    corner = limit * torch.where(signs == 0, drawn, signs)
    bounds = list(zip((-limit).tolist(), limit.tolist(), strict=True))
    for first in (BESIDE * corner, corner):
        minimize(fall, first.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": iterations})
    highest = max(found)
    percent = PERCENT * (highest - found[0]) / (1 + found[0])
    return Sharpness(percent=percent, start=found[0], highest=highest, evaluations=len(found))


def _load_scipy() -> Any:
    try:
        from scipy.optimize import minimize
    except ImportError:
        cure = "pip install 'recforge[study]'"
        raise ValueError(f"sharpness: expected scipy, found none; install it with `{cure}`") from None
    return minimize


def _draw_basis(at: Tensor, subspace: int | None, generator: torch.Generator) -> Tensor | None:
    if subspace is None:
        return None
    drawn = torch.randn(len(at), min(subspace, len(at)), generator=generator, dtype=torch.float32)
    basis: Tensor = drawn / drawn.norm(dim=0)
    return basis.to(at.dtype).to(at.device)


def _coordinates(basis: Tensor, at: Tensor) -> Tensor:
    """Return A^+ w, by the normal equations: random columns are nearly orthogonal."""
    coordinates: Tensor = torch.linalg.solve(basis.T @ basis, basis.T @ at)
    return coordinates

"""The Hessian's spectrum by stochastic Lanczos quadrature: its ends, its density and its trace."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dlrm.analysis.curvature.lanczos import Product, RitzValues, lanczos, random_start


def find_extremes(
    product: Product, like: Tensor, *, steps: int = 80, tolerance: float = 1e-3, seed: int = 0
) -> RitzValues:
    """Find the smallest and the largest eigenvalue of a symmetric matrix [n, n].

    Args:
        product: of the matrix.
        like: a vector of its length, type and device.
        steps: at most; the errors of what comes back say how far that went.
        tolerance: errors at both ends that are small enough, relative to the larger of the two in magnitude.
        seed: of the starting vector.
    """

    def are_known(ritz: RitzValues) -> bool:
        scale = float(ritz.values.abs().max())
        return len(ritz.values) > 2 and max(ritz.smallest[1], ritz.largest[1]) <= tolerance * scale

    return lanczos(product, random_start(len(like), seed, like), steps, until=are_known)


def probe_spectrum(product: Product, like: Tensor, *, steps: int = 30, seed: int = 0) -> RitzValues:
    """Return one probe of a spectrum: weights that say which share of all eigenvalues lies near which value.

    The quadrature of Golub and Welsch from a random vector of signs (Ubaru, Chen and Saad 2017, "Fast estimation of
    tr(f(A)) via stochastic Lanczos quadrature"; for networks Ghorbani et al. 2019, arXiv:1901.10159).
    """
    return lanczos(product, random_start(len(like), seed, like), steps)


def estimate_trace(probes: Sequence[RitzValues], num_weights: int) -> tuple[float, float]:
    """Return the trace, and its standard error over the probes (nan with a single one)."""
    traces = torch.stack([num_weights * (probe.weights @ probe.values) for probe in probes])
    error = float(traces.std() / math.sqrt(len(probes))) if len(probes) > 1 else math.nan
    return float(traces.mean()), error


def share_below(probes: Sequence[RitzValues], value: float) -> float:
    """Return which share of all eigenvalues lies below a value."""
    return float(torch.stack([probe.weights[probe.values < value].sum() for probe in probes]).mean())


def density(probes: Sequence[RitzValues], at: Tensor, width: float) -> Tensor:
    """Return the spectrum's density, [len(at)], which integrates to 1: the probes' mean, smoothed by a Gaussian.

    Args:
        probes: of one matrix.
        at: where to give it.
        width: the Gaussian's standard deviation.
    """
    return torch.stack([_smooth(probe, at, width) for probe in probes]).mean(dim=0)


def _smooth(probe: RitzValues, at: Tensor, width: float) -> Tensor:
    distance = (at[:, None] - probe.values) / width
    bumps = torch.exp(-0.5 * distance.square()) / (width * math.sqrt(2 * math.pi))
    return bumps @ probe.weights

"""What a batch costs, given the critical one: E(B) = Emin (1 + B / Bcrit) samples in S(B) = Smin (1 + Bcrit / B) steps.

McCandlish et al. 2018, arXiv:1812.06162, section 2.3; the gradient noise scale is an estimate of Bcrit.
"""

from __future__ import annotations


def relative_samples(batch_size: float, critical: float) -> float:
    """Return how many times the samples of a very small batch it takes to get as far."""
    return 1.0 + batch_size / critical


def more_samples(batch_size: float, critical: float, times: float = 2.0) -> float:
    """Return which share of samples a batch `times` as large takes beyond those of this one."""
    return relative_samples(times * batch_size, critical) / relative_samples(batch_size, critical) - 1.0


def fewer_steps(batch_size: float, critical: float, times: float = 2.0) -> float:
    """Return which share of the steps a batch `times` as large saves."""
    return 1.0 - (1.0 + more_samples(batch_size, critical, times)) / times

"""MCLRec's contrastive regulariser, which keeps augmented views from parting further than their hardest negatives.

Despite its name it pulls against the contrast: positives down to the hardest negative, and negatives up to it. Two
variants are published (Qin et al. 2023, SIGIR): that of the code, which made the published numbers, and the paper's.
"""

from __future__ import annotations

from torch import Tensor

from contrastive.losses.contrast import Contrast


def row_regulariser(pairs: Contrast) -> Tensor:
    """The published code's: each vector has its own margin, its hardest negative ``m_i``.

    With the positive ``p_i`` and the negatives ``n_ij`` of vector i::

        mean_i relu(p_i - m_i) + mean_ij (max(p_i, m_i) - n_ij)

    The second term is never clipped, and gradients flow through the margins. A sample by itself has no negatives, and
    costs nothing.

    Returns:
        A scalar.
    """
    vectors = len(pairs.positives)
    if vectors == 2:
        return 0.0 * pairs.positives.sum()
    hardest = pairs.negatives().amax(1)
    above = (pairs.positives - hardest).relu()
    others = pairs.similarities.masked_fill(pairs.similarities.isneginf(), 0.0).sum() - pairs.positives.sum()
    # max(p, m) is m + relu(p - m)
    return (2.0 * above + hardest).mean() - others / (vectors * (vectors - 2))


def batch_regulariser(pairs: Contrast) -> Tensor:
    """The paper's: two margins for the whole batch.

    With ``o_min`` and ``o_max`` the lower and the higher of the lowest positive and the highest negative::

        mean_i relu(p_i - o_min) + mean_ij relu(o_max - n_ij)

    A sample by itself has no negatives, and costs nothing.

    Returns:
        A scalar.
    """
    vectors = len(pairs.positives)
    if vectors == 2:
        return 0.0 * pairs.positives.sum()
    negatives = pairs.negatives()
    lowest, highest = pairs.positives.min(), negatives.max()
    lower, upper = lowest.minimum(highest), lowest.maximum(highest)
    below = (upper - negatives).masked_fill(negatives.isneginf(), 0.0).relu()
    return (pairs.positives - lower).relu().mean() + below.sum() / (vectors * (vectors - 2))

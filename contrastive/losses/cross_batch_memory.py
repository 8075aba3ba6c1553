"""Contrast with vectors of earlier batches, the usual way to more negatives than a batch holds: MCLRec's rival.

A baseline, and off the hot path: it is pytorch-metric-learning's, slower than our own contrast.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from contrastive.losses.contrast import check_views


class CrossBatchMemory(nn.Module):
    """InfoNCE of two views against the last `size` vectors (Wang et al. 2020, arXiv:1912.06798).

    Vectors of the batch itself enter the memory first. What stands in the memory is constant, the other view of a
    sample too, so that the gradient is that of the vectors as anchors only. The memory is part of the state dict.

    Args:
        dim: Length of a vector.
        size: Vectors that are remembered; at least those of one batch.
        temperature: Divides the dot products.

    Raises:
        ImportError: With the command that installs pytorch-metric-learning, where it is missing.
    """

    _pushed: Tensor  # [1] int64 vectors so far; the library keeps its own place in numbers that no checkpoint sees

    def __init__(self, dim: int, size: int = 4096, temperature: float = 1.0) -> None:
        super().__init__()
        try:
            from pytorch_metric_learning import distances, losses
        except ImportError as error:
            raise ImportError(
                "cross-batch memory needs pytorch-metric-learning: pip install 'recforge[contrastive]'"
            ) from error
        distance = distances.DotProductSimilarity(normalize_embeddings=False)
        self._memory = losses.CrossBatchMemory(losses.SupConLoss(temperature, distance=distance), dim, size)
        self.register_buffer("_pushed", torch.zeros(1, dtype=torch.int64))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Remember both views, [B, dim] each, and contrast them with all that is remembered.

        Raises:
            ValueError: If the memory cannot hold the batch.
        """
        check_views(first, second)
        size, vectors = self._memory.memory_size, 2 * len(first)
        if vectors > size:
            raise ValueError(f"--mclrec.memory-size: expected at least the {vectors} vectors of a batch, got {size}")
        pushed = int(self._pushed)
        self._memory.queue_idx, self._memory.has_been_filled = pushed % size, pushed >= size
        # no sample of another batch has the same label, this run or the one it goes on from
        labels = torch.arange(pushed, pushed + len(first), device=first.device).repeat(2)
        loss = cast(Tensor, self._memory(torch.cat([first, second]), labels))
        self._pushed += vectors
        return loss

"""A batch's ids as the tables read them: checked once, so that no kernel follows a wrong offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True, kw_only=True)
class Jagged:
    """Ids of several features: bag ``b`` of feature ``f`` is ``ids[offsets[c] : offsets[c + 1]]``.

    There ``c = positions[f] * batch_size + b``: features keep the place that they have in the batch.
    """

    ids: Tensor  # [num_ids], int32 or int64
    offsets: Tensor  # [num_keys * batch_size + 1], int64
    positions: list[int]  # of the tables' features among the batch's keys
    ids_per_feature: list[int]  # in the tables' order
    batch_size: int
    weights: Tensor | None = None  # [num_ids] float32

    def cell_of(self, at: int) -> int:
        """Says which ``c`` holds ``ids[at]``."""
        return int(torch.searchsorted(self.offsets, at, right=True)) - 1

    def bag_of(self, at: int) -> int:
        """Says which bag of its feature holds ``ids[at]``."""
        return self.cell_of(at) % self.batch_size


def read_jagged(features: KeyedJaggedTensor, names: Sequence[str]) -> Jagged:
    """Reads the named features out of a batch, in any order and among others.

    Raises:
        ValueError: When a feature is missing, what the batch holds does not fit together, or its weights are to be
            learned.
    """
    keys = features.keys()
    place = {key: i for i, key in enumerate(keys)}
    for name in names:
        if name not in place:
            raise ValueError(f"feature {name!r}: expected it in the batch, got the features {', '.join(keys)}")
    if features.variable_stride_per_key():
        raise ValueError("batch: expected as many bags in every feature, got a batch size per feature")
    weights = features.weights_or_none()
    if weights is not None and weights.requires_grad:
        raise ValueError("batch: expected weights that need no gradient, got some that do: tables give them none")
    ids, offsets, batch_size = features.values().contiguous(), features.offsets().long(), features.stride()
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"batch: expected ids of type int32 or int64, got {ids.dtype}")
    if weights is not None:
        weights = weights.float().contiguous()
        if weights.shape != ids.shape:
            raise ValueError(f"batch: expected a weight for each of {ids.numel()} ids, got {weights.numel()} weights")
    if batch_size == 0:
        return Jagged(
            ids=ids,
            offsets=offsets,
            positions=[place[name] for name in names],
            ids_per_feature=[0] * len(names),
            batch_size=0,
            weights=weights,
        )
    ends = offsets[::batch_size].tolist()
    if ends[0] != 0 or ends[-1] != ids.numel() or len(ends) != len(keys) + 1 or bool((offsets.diff() < 0).any()):
        raise ValueError(f"batch: expected lengths >= 0 that add up to {ids.numel()} ids, got a sum of {ends[-1]}")
    positions = [place[name] for name in names]
    counts = [ends[position + 1] - ends[position] for position in positions]
    return Jagged(
        ids=ids,
        offsets=offsets,
        positions=positions,
        ids_per_feature=counts,
        batch_size=batch_size,
        weights=weights,
    )

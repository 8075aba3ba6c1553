"""Ids are checked on the GPU without making it wait: what was found is read when the step waits for it anyway."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.jagged import Jagged, read_jagged


class WrongId(NamedTuple):
    """Where an id outside its table stands: ``batch.ids[at]``, of one of the tables' features."""

    batch: Jagged
    feature: int
    at: int


class _Pending(NamedTuple):
    batch: Jagged
    flags: Tensor  # [3]: whether there is a wrong id, the place of the first, whether a length is below 0
    copied: torch.cuda.Event | None


class LateCheck:
    """Looks for ids outside their tables in one batch at a time.

    Args:
        limits: Number of rows by feature, [num_features] int64, where ids will lie.
    """

    def __init__(self, limits: Tensor) -> None:
        self._limits = limits
        self._by_key = list(range(len(limits))), limits  # of the positions that came last
        self._pending: _Pending | None = None

    def begin(self, batch: Jagged) -> Tensor:
        """Starts checking, and returns the ids with 0 for those outside, which no kernel can take harm from."""
        if not batch.ids.numel():
            return batch.ids
        ends = batch.offsets[:: batch.batch_size]
        limits = self._limits_by_key(batch.positions, len(ends) - 1)
        limits = torch.repeat_interleave(limits, ends.diff(), output_size=batch.ids.numel())
        outside = (batch.ids < 0) | (batch.ids >= limits)
        found = torch.stack([outside.any(), outside.byte().argmax(), (batch.offsets.diff() < 0).any()])
        copied = None
        if found.is_cuda:
            host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            found = host.copy_(found, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending = _Pending(batch, found, copied)
        return batch.ids.masked_fill(outside, 0)

    def _limits_by_key(self, positions: list[int], num_keys: int) -> Tensor:
        known, limits = self._by_key
        if known != positions or len(limits) != num_keys:
            limits = self._limits.new_zeros(num_keys)
            limits[positions] = self._limits  # a copy to the GPU that is waited for: kept for batches of this form
            self._by_key = list(positions), limits
        return limits

    def finish(self) -> WrongId | None:
        """Waits for what ``begin`` started, and returns the first wrong id of that batch.

        Raises:
            ValueError: When a bag's length was below 0.
        """
        if self._pending is None:
            return None
        (batch, flags, copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        some, at, malformed = flags.tolist()
        if malformed:
            raise ValueError(f"batch: expected lengths >= 0 that add up to {batch.ids.numel()} ids, got some below 0")
        if not some:
            return None
        key = int(torch.searchsorted(batch.offsets[:: batch.batch_size].contiguous(), at, right=True)) - 1
        return WrongId(batch, batch.positions.index(key), at)


def read_features(features: KeyedJaggedTensor, names: Sequence[str]) -> KeyedJaggedTensor:
    """Takes the named features out of a batch, in this order and with their weights, if it has any.

    It waits for a GPU only if the batch does not bring along how many ids each feature has
    (``length_per_key``), which a batch does that was asked for it before it was copied there.

    Raises:
        ValueError: When a feature is missing, or what the batch holds does not fit together.
    """
    keys = features.keys()
    if features.values().is_cuda:
        _check_form(features, names)
    else:
        read_jagged(features, names)
    positions = [keys.index(name) for name in names]
    return features if positions == list(range(len(keys))) else take_keys(features, tuple(positions))


def as_jagged(features: KeyedJaggedTensor) -> Jagged:
    """Returns what ``read_features`` gave in the form that checks take."""
    return Jagged(
        ids=features.values().contiguous(),
        offsets=features.offsets().long(),
        positions=list(range(len(features.keys()))),
        ids_per_feature=features.length_per_key(),
        batch_size=features.stride(),
    )


def take_keys(features: KeyedJaggedTensor, positions: tuple[int, ...]) -> KeyedJaggedTensor:
    """Takes features out of a batch by their places; a GPU is waited for only the first time that they are these."""
    return features.permute(list(positions), _index_on(features.device(), positions))


@lru_cache(maxsize=64)
def _index_on(device: torch.device, positions: tuple[int, ...]) -> Tensor:
    return torch.tensor(positions, dtype=torch.int32, device=device)


def _check_form(features: KeyedJaggedTensor, names: Sequence[str]) -> None:
    keys, ids, weights = features.keys(), features.values(), features.weights_or_none()
    for name in names:
        if name not in keys:
            raise ValueError(f"feature {name!r}: expected it in the batch, got the features {', '.join(keys)}")
    if features.variable_stride_per_key():
        raise ValueError("batch: expected as many bags in every feature, got a batch size per feature")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"batch: expected ids of type int32 or int64, got {ids.dtype}")
    if weights is not None and (weights.requires_grad or weights.shape != ids.shape):
        raise ValueError(
            f"batch: expected a weight for each of {len(ids)} ids and no gradient of it, got {len(weights)}"
        )
    if features.lengths().numel() != len(keys) * features.stride():
        raise ValueError(f"batch: expected {len(keys) * features.stride()} lengths, got {features.lengths().numel()}")
    total = sum(features.length_per_key())
    if total != ids.numel():
        raise ValueError(f"batch: expected lengths >= 0 that add up to {ids.numel()} ids, got a sum of {total}")

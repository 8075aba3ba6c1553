"""The one form in which training data reaches a model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

# torchrec asks torch.fx, at the first batch, something that torch.fx warns about; nothing follows from it.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@dataclass
class Batch(Pipelineable):
    """Rows of a click log, ready for a model.

    Attributes:
        dense: [B, num_numeric] float32, transformed numeric columns.
        sparse: ids of every categorical feature; B bags per feature.
        labels: [B] float32, 0 or 1.
        rows: [B] int64, where in its split of the dataset each sample stands.
        global_size: samples of the whole batch, of which these may be one rank's share; None means that these are all.
        first: number of the whole batch's first sample in the stream of training; None means the one after those that
            the run has trained.
    """

    dense: torch.Tensor
    sparse: KeyedJaggedTensor
    labels: torch.Tensor
    rows: torch.Tensor
    global_size: int | None = None
    first: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Return the batch on `device`."""
        return Batch(
            dense=self.dense.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            rows=self.rows.to(device, non_blocking=non_blocking),
            global_size=self.global_size,
            first=self.first,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` still reads these tensors."""
        for part in (self.dense, self.sparse, self.labels, self.rows):
            part.record_stream(stream)

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory, from which a GPU copies asynchronously."""
        return Batch(
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=self.labels.pin_memory(),
            rows=self.rows.pin_memory(),
            global_size=self.global_size,
            first=self.first,
        )

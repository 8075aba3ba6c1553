"""The one form in which sequences reach a model: items by their place among the rows looked up, no padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


class Histories(NamedTuple):
    """B histories, one after the other.

    Attributes:
        places: [T] int64, place of each item in the rows looked up; 0 is PAD, a hidden item or, by itself, no history.
        lengths: [B] int64, items of each history, at least one.
    """

    places: torch.Tensor
    lengths: torch.Tensor


@dataclass
class SequenceBatch(Pipelineable):
    """Histories and what came next, ready for a model.

    One unpooled look-up of `sparse` gives the rows [n, dim] which the batch needs, each once. Everything else names an
    item by its place in these rows. The row of PAD, id 0, has place 0. Where the softmax is full, all ids are looked
    up in order, so that an item's place is its id.

    What is looked up stays in the CPU's memory, where the tables are, when the rest goes to a GPU.

    Attributes:
        sparse: what is looked up: feature "item", one bag of n ids.
        history: B histories as they were.
        views: the histories augmented, B each: none or two.
        targets: [B] int64, place of the item which came next.
        rows: [B] int64, where in its split of the dataset each sample stands.
        sides: side features of the rows looked up, n bags each, that of PAD empty; None without any.
        log_q: [n] float32, log of how likely the row of a place was to be drawn as a negative of this batch; -inf for
            those that were not drawn: PAD, and items which are in histories only. None for a full softmax.
        global_size: samples of the whole batch, of which these may be one rank's share; None means that these are all.
        first: number of the whole batch's first sample in the stream of training; None means the one after those that
            the run has trained.
    """

    sparse: KeyedJaggedTensor
    history: Histories
    views: tuple[Histories, ...]
    targets: torch.Tensor
    rows: torch.Tensor
    sides: KeyedJaggedTensor | None = None
    log_q: torch.Tensor | None = None
    global_size: int | None = None
    first: int | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device, non_blocking: bool = False) -> SequenceBatch:
        """Return the batch on `device`, but for what is looked up."""
        return replace(
            self,
            history=_move(self.history, device, non_blocking),
            views=tuple(_move(view, device, non_blocking) for view in self.views),
            targets=self.targets.to(device, non_blocking=non_blocking),
            rows=self.rows.to(device, non_blocking=non_blocking),
            log_q=None if self.log_q is None else self.log_q.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` still reads these tensors."""
        parts = [part for histories in (self.history, *self.views) for part in histories]
        for part in (*parts, self.targets, self.rows, self.log_q):
            if part is not None:
                part.record_stream(stream)

    def pin_memory(self) -> SequenceBatch:
        """Return a copy of what `to` moves in page-locked memory, from which a GPU copies asynchronously."""
        return replace(
            self,
            history=Histories(*(part.pin_memory() for part in self.history)),
            views=tuple(Histories(*(part.pin_memory() for part in view)) for view in self.views),
            targets=self.targets.pin_memory(),
            rows=self.rows.pin_memory(),
            log_q=None if self.log_q is None else self.log_q.pin_memory(),
        )


def _move(histories: Histories, device: torch.device, non_blocking: bool) -> Histories:
    return Histories(*(part.to(device, non_blocking=non_blocking) for part in histories))

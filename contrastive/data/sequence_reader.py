"""Reads prepared sequences as batches, views and negatives with them, each a pure function of seed and position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from contrastive.augment.draws import Draws
from contrastive.augment.operators import Augmentation
from contrastive.augment.views import draw_views
from contrastive.data.negatives import NegativeSampler, NegativesConfig
from contrastive.data.ragged import Ragged, spans
from contrastive.data.same_target import SameTarget
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.sequences import ITEM, PAD
from contrastive.sequence_batch import Histories, SequenceBatch
from dlrm.data.dataset import IntArray
from dlrm.data.read_ahead import BatchSize, Share, cut_batches, read_ahead

MAX_LENGTH = 50
_VIEWS, _SAME_TARGET = 0, 1


class SequenceReader:
    """The endless stream of a split's samples: epoch after epoch, each sample once per epoch.

    Sample number p of the stream, and its views, depend on (dataset, seed, p) alone; drawn negatives, on the place of
    the whole batch. A run that resumes at p therefore goes on exactly where it stopped, and ranks that share a batch
    see what one process sees.

    Args:
        dataset: the prepared sequences.
        split: train, valid or test.
        shuffle: draw a new order for every epoch; otherwise users come one after the other.
        seed: of the order, the views and the negatives.
        max_length: of histories, of which the latest items are kept.
        augment: operators of which two different ones make the views of each sample; empty makes two views that are
            the history as it is; None makes no views.
        same_target: the second view is the history of another sample with the same target, as it is.
        negatives: for a sampled softmax; None looks all items up.
        skip_unseen: leave items out of histories that do not occur in the training part, as their rows are what they
            were at first; the latest one stays where there is no other. By default they are looked up like any other.

    Attributes:
        joins_sides: look side features up with the items, for tables that give a vector for each id; `sides` of a
            batch then says which ids are of which item.

    Raises:
        ValueError: the split has no samples, or max_length is below 1.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        split: str,
        *,
        shuffle: bool = False,
        seed: int = 0,
        max_length: int = MAX_LENGTH,
        augment: Sequence[Augmentation] | None = None,
        same_target: bool = False,
        negatives: NegativesConfig | None = None,
        skip_unseen: bool = False,
    ) -> None:
        if not dataset.rows(split):
            raise ValueError(f"expected samples in the split '{split}' of {dataset.folder}, got none; check the source")
        if max_length < 1:
            raise ValueError(f"--sequence.max-length: expected at least 1, got {max_length}")
        self.dataset, self.split, self.shuffle, self.seed, self.max_length = dataset, split, shuffle, seed, max_length
        self.num_rows = dataset.rows(split)
        self.augment, self.skip_unseen, self.joins_sides = augment, skip_unseen, False
        self.negatives = None if negatives is None else NegativeSampler(dataset, negatives, seed)
        self._same_target = SameTarget(dataset, split) if same_target else None
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def read(self, position: int, batch_size: int, share: Share | None = None) -> SequenceBatch:
        """Return the batch of samples [position, position + batch_size) of the stream, cut at the end of the epoch.

        Args:
            position: number of the first sample in the stream.
            batch_size: samples of the whole batch.
            share: which of them to read, where others read the rest.
        """
        epoch, start = divmod(position, self.num_rows)
        size = min(batch_size, self.num_rows - start)
        first, count = (0, size) if share is None else share(size)
        whole = self._order(epoch)[start : start + size] if self.shuffle else np.arange(start, start + size)
        rows = whole[first : first + count].copy()
        histories, targets, _ = self.dataset.samples(self.split, rows, self.max_length)
        if self.skip_unseen:
            histories = self.dataset.without_unseen(histories)
        lists = [histories, *self._draw_views(histories, targets, rows, position + first)]
        if self.negatives is None:
            ids, log_q = None, None
        else:
            drawn = self.negatives.draw(position)
            if self.negatives.config.in_batch:
                drawn = np.concatenate([drawn, targets if count == size else self.dataset.targets(self.split, whole)])
            ids, place_of = self._number([drawn, targets, *(items for items, _ in lists)])
            log_q = _log_q(self.negatives, ids, place_of[drawn], size)
            lists = [Ragged(place_of[items], lengths) for items, lengths in lists]
            targets = place_of[targets]
        sides = self._all_sides if ids is None else self._gather_sides(ids)
        parts = [Histories(torch.from_numpy(items), torch.from_numpy(lengths)) for items, lengths in lists]
        return SequenceBatch(
            # An object of its own for each batch: by it, tables know which one has been prefetched.
            sparse=_one_bag_each(self._all_items if ids is None else ids, sides if self.joins_sides else None),
            history=parts[0],
            views=tuple(parts[1:]),
            targets=torch.from_numpy(targets),
            rows=torch.from_numpy(rows),
            sides=sides,
            log_q=log_q,
            global_size=size,
            first=position,
        )

    def batches(
        self, batch_size: int | BatchSize, *, start: int = 0, stop: int | None = None, share: Share | None = None
    ) -> Iterator[SequenceBatch]:
        """Yield the batches of samples [start, stop), read ahead in a thread; without `stop`, for ever.

        Args:
            batch_size: samples per batch; the last one of an epoch may be smaller. A function is asked when a batch
                is cut, some batches before it comes out.
            start: number of the first sample in the stream.
            stop: number of the first sample that is not read.
            share: which samples of each batch to read, where others read the rest; there may be none in a batch.
        """
        places = cut_batches(self.num_rows, batch_size, start, stop)
        yield from read_ahead(lambda position, size: self.read(position, size, share), places)

    def _draw_order(self, epoch: int) -> IntArray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)

    def _draw_views(self, histories: Ragged, targets: IntArray, rows: IntArray, first: int) -> tuple[Ragged, ...]:
        if self.augment is None and self._same_target is None:
            return ()
        draws = Draws.of(self.seed, np.arange(first, first + len(rows)))
        views = (histories, histories)
        if self.augment:
            views = draw_views(self.augment, histories, draws.fork(_VIEWS))
        if self._same_target is None:
            return views
        others = self._same_target.draw(rows, targets, draws.fork(_SAME_TARGET))
        return views[0], self.dataset.samples(self.split, others, self.max_length).histories

    def _number(self, parts: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
        """Return the ids that occur, PAD first and ascending, and an array that holds the place of each at its id."""
        # A byte for each item of the catalogue takes a tenth of the time of sorting what occurs.
        occurs = np.zeros(self.dataset.num_items + 1, dtype=bool)
        occurs[PAD] = True
        for part in parts:
            occurs[part] = True
        ids = np.flatnonzero(occurs)
        place_of = np.empty(len(occurs), dtype=np.int64)
        place_of[ids] = np.arange(len(ids))
        return ids, place_of

    @cached_property
    def _all_items(self) -> IntArray:
        return np.arange(self.dataset.num_items + 1)

    @cached_property
    def _all_sides(self) -> KeyedJaggedTensor | None:
        return self._gather_sides(self._all_items)

    def _gather_sides(self, ids: IntArray) -> KeyedJaggedTensor | None:
        if not self.dataset.sides:
            return None
        values, lengths = [], []
        for bags in self.dataset.sides.values():
            counts = bags.offsets[ids + 1] - bags.offsets[ids]
            values.append(bags.values[spans(bags.offsets[ids], counts)])
            lengths.append(counts)
        return KeyedJaggedTensor(
            keys=list(self.dataset.sides),
            values=torch.from_numpy(np.concatenate(values, dtype=np.int64)),
            lengths=torch.from_numpy(np.concatenate(lengths, dtype=np.int32)),
        )


def _one_bag_each(ids: IntArray, sides: KeyedJaggedTensor | None) -> KeyedJaggedTensor:
    values, keys, counts = torch.from_numpy(ids), [ITEM], [len(ids)]
    if sides is not None:
        values, keys = torch.cat([values, sides.values()]), keys + sides.keys()
        counts += sides.length_per_key()
    return KeyedJaggedTensor(keys=keys, values=values, lengths=torch.tensor(counts, dtype=torch.int32))


def _log_q(sampler: NegativeSampler, ids: IntArray, drawn: IntArray, batch_size: int) -> torch.Tensor:
    """Return [n], how likely each id was to be drawn, as a log; -inf for all but those at the places `drawn`."""
    logs = np.full(len(ids), -np.inf, dtype=np.float32)
    logs[drawn] = sampler.log_expected(ids[drawn], batch_size)
    return torch.from_numpy(logs)

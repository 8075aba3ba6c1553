"""The reader gives each sample once per epoch, the same views after a resumption, and ranks what one process sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice, permutations

import numpy as np
import pytest
import torch

from contrastive.augment.operators import Crop, Mask, Reorder
from contrastive.data.negatives import NegativeSampler, NegativesConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.sequence_reader import SequenceReader
from contrastive.data.sequence_schema import SequenceSchema
from contrastive.sequence_batch import Histories, SequenceBatch
from dlrm.distributed.ranks import Ranks

OPERATORS = (Crop(), Mask(), Reorder())
Sample = tuple[int, int, list[list[int]]]


def ids_of(batch: SequenceBatch) -> torch.Tensor:
    assert batch.sparse.keys() == ["item"]
    assert batch.sparse.lengths().tolist() == [len(batch.sparse.values())]
    return batch.sparse.values()


def as_lists(batch: SequenceBatch, histories: Histories) -> list[list[int]]:
    ids = ids_of(batch)[histories.places]
    return [part.tolist() for part in torch.split(ids, histories.lengths.tolist())]


def samples_of(batch: SequenceBatch) -> list[Sample]:
    """Each sample with everything that belongs to it, as ids of items."""
    assert ids_of(batch)[0] == 0
    lists = [as_lists(batch, part) for part in (batch.history, *batch.views)]
    targets = ids_of(batch)[batch.targets].tolist()
    return list(zip(batch.rows.tolist(), targets, map(list, zip(*lists, strict=True)), strict=True))


def read_all(reader: SequenceReader, batch_size: int, **arguments: int) -> list[Sample]:
    return [sample for batch in reader.batches(batch_size, **arguments) for sample in samples_of(batch)]


@pytest.mark.parametrize("negatives", [None, NegativesConfig(count=20)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_once_per_epoch(
    dataset: SequenceDataset, shuffle: bool, negatives: NegativesConfig | None
) -> None:
    reader = SequenceReader(dataset, "train", shuffle=shuffle, seed=3, negatives=negatives, max_length=7)
    count = reader.num_rows
    assert count == dataset.rows("train")
    samples = read_all(reader, 64, stop=2 * count)
    for epoch in range(2):
        rows = [sample[0] for sample in samples[epoch * count : (epoch + 1) * count]]
        assert sorted(rows) == list(range(count))
        assert (rows == list(range(count))) is not shuffle
    sequences = np.split(dataset.actions, dataset.first_actions[1:])
    prefixes = [
        (sequence[max(end - 7, 0) : end].tolist(), int(sequence[end]))
        for sequence in sequences
        for end in range(1, len(sequence) - 2)
    ]
    assert all((history, target) == prefixes[row] for row, target, [history] in samples)


@pytest.mark.parametrize("negatives", [None, NegativesConfig(count=20, power=0.5)])
@pytest.mark.parametrize("same_target", [False, True])
def test_views_belong_to_the_sample_of_the_stream(
    dataset: SequenceDataset, same_target: bool, negatives: NegativesConfig | None
) -> None:
    def make(seed: int = 5) -> SequenceReader:
        arguments = {"augment": OPERATORS, "same_target": same_target, "negatives": negatives}
        return SequenceReader(dataset, "train", shuffle=True, seed=seed, **arguments)

    count = dataset.rows("train")
    whole = read_all(make(), 100, stop=2 * count)
    for start in (0, 1, 99, count - 3, count, count + 17):
        assert read_all(make(), 33, start=start, stop=min(start + 120, 2 * count)) == whole[start : start + 120]
    assert [sample[2] for sample in sorted(whole[:count])] != [sample[2] for sample in sorted(whole[count:])]
    assert read_all(make(seed=6), 100, stop=count) != whole[:count]
    changed = [views for _, _, (history, *views) in whole if len(history) > 2 and history not in views]
    assert len(changed) > 100


def test_ranks_read_what_one_process_reads(dataset: SequenceDataset) -> None:
    def make() -> SequenceReader:
        arguments = {"augment": OPERATORS, "negatives": NegativesConfig(count=30)}
        return SequenceReader(dataset, "train", shuffle=True, seed=1, **arguments)

    whole = list(make().batches(50, start=20, stop=400))
    shares = [
        list(make().batches(50, start=20, stop=400, share=Ranks(rank=rank, count=3).share_of)) for rank in range(3)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [sample for part in parts for sample in samples_of(part)] == samples_of(batch)
        assert {(part.global_size, part.first) for part in parts} == {(len(batch), batch.first)}
        negatives = [drawn_of(part) for part in (batch, *parts)]
        assert all(drawn == negatives[0] for drawn in negatives)


def drawn_of(batch: SequenceBatch) -> dict[int, float]:
    """The negatives of a batch and the log of how likely they were."""
    assert batch.log_q is not None
    assert batch.log_q.dtype == torch.float32
    places = torch.isfinite(batch.log_q).nonzero().squeeze(1)
    assert (batch.log_q[~torch.isfinite(batch.log_q)] == -torch.inf).all()
    return dict(zip(ids_of(batch)[places].tolist(), batch.log_q[places].tolist(), strict=True))


@pytest.mark.parametrize("ranks", [2, 7])
def test_a_rank_may_have_no_samples(dataset: SequenceDataset, ranks: int) -> None:
    reader = SequenceReader(dataset, "train", augment=OPERATORS, same_target=True, negatives=NegativesConfig(count=5))
    parts = [reader.read(0, 1, Ranks(rank=rank, count=ranks).share_of) for rank in range(ranks)]
    assert sorted(len(part) for part in parts) == [0] * (ranks - 1) + [1]
    assert all(len(part.views) == 2 and part.global_size == 1 for part in parts)


def test_full_softmax_names_items_by_their_ids(dataset: SequenceDataset) -> None:
    batch = SequenceReader(dataset, "valid").read(0, 50)
    assert ids_of(batch).tolist() == list(range(dataset.num_items + 1))
    assert batch.log_q is None
    assert batch.views == ()
    assert batch.history.places.dtype == batch.history.lengths.dtype == batch.targets.dtype == torch.int64


@pytest.mark.parametrize("in_batch", [False, True])
def test_negatives_are_what_was_drawn(dataset: SequenceDataset, in_batch: bool) -> None:
    config = NegativesConfig(count=12, power=0.5, in_batch=in_batch)
    reader, sampler = SequenceReader(dataset, "train", seed=2, negatives=config), NegativeSampler(dataset, config, 2)
    for batch in reader.batches(10, stop=200):
        assert batch.first is not None
        ids, drawn = ids_of(batch), set(sampler.draw(batch.first).tolist())
        if in_batch:
            drawn |= set(ids[batch.targets].tolist())
        assert drawn_of(batch).keys() == drawn
        expected = sampler.log_expected(np.array(sorted(drawn)), 10)
        assert np.array_equal([drawn_of(batch)[item] for item in sorted(drawn)], expected)
        assert len(set(ids.tolist())) == len(ids)


def test_the_second_view_may_be_of_the_same_target(prepare_lines: Callable[..., SequenceDataset]) -> None:
    # trained are 1 -> 2, 1 2 -> 5, 3 -> 4, 3 4 -> 5 and 8 -> 5
    dataset = prepare_lines([[1, 2, 5, 6, 7], [3, 4, 5, 6, 7], [8, 5, 6, 7]])
    reader = SequenceReader(dataset, "train", shuffle=True, seed=4, same_target=True)
    seen = Counter((tuple(history), tuple(other)) for _, _, (history, same, other) in read_all(reader, 2, stop=5 * 100))
    alone = {((1,), (1,)): 100, ((3,), (3,)): 100}
    assert {pair: count for pair, count in seen.items() if pair[0] == pair[1]} == alone
    others = {pair: count for pair, count in seen.items() if pair not in alone}
    assert set(others) == set(permutations([(1, 2), (3, 4), (8,)], 2))
    assert all(abs(count - 50) < 5 * np.sqrt(25) for count in others.values())


def test_the_first_view_beside_one_of_the_same_target(dataset: SequenceDataset) -> None:
    plain = SequenceReader(dataset, "train", same_target=True).read(0, 300)
    assert samples_of(plain) == [(r, t, [h, h, other]) for r, t, (h, _, other) in samples_of(plain)]
    augmented = SequenceReader(dataset, "train", same_target=True, augment=OPERATORS).read(0, 300)
    both = SequenceReader(dataset, "train", augment=OPERATORS).read(0, 300)
    assert as_lists(augmented, augmented.views[0]) == as_lists(both, both.views[0])
    assert as_lists(augmented, augmented.views[1]) == as_lists(plain, plain.views[1])


def test_without_operators_both_views_are_the_history(dataset: SequenceDataset) -> None:
    for _, _, (history, *views) in samples_of(SequenceReader(dataset, "train", augment=()).read(0, 100)):
        assert views == [history, history]


def test_first_actions_come_after_pad(prepare_lines: Callable[..., SequenceDataset]) -> None:
    lists = [[1, 2, 5, 6, 7], [3, 4, 6, 7], [2, 6, 7]]
    dataset = prepare_lines(lists, SequenceSchema(first_actions=True))
    samples = samples_of(SequenceReader(dataset, "train", augment=OPERATORS).read(0, 9))
    assert [(t, h) for _, t, (h, *_) in samples] == [(1, [0]), (2, [1]), (5, [1, 2]), (3, [0]), (4, [3]), (2, [0])]
    assert [view for _, _, (history, *views) in samples for view in views if history == [0]] == [[0]] * 6
    same = samples_of(SequenceReader(dataset, "train", same_target=True).read(0, 9))
    assert [other for _, target, (*_, other) in same if target == 2] == [[0], [1]]


def test_unseen_items_may_be_skipped(prepare_lines: Callable[..., SequenceDataset]) -> None:
    # 7 and 8 occur in held-out places only
    dataset = prepare_lines([[1, 2, 3, 7, 4], [2, 1, 3, 4, 8, 7], [3, 1, 8, 7]])
    histories = [sample[2] for sample in samples_of(SequenceReader(dataset, "test").read(0, 3))]
    assert histories == [[[1, 2, 3, 7]], [[2, 1, 3, 4, 8]], [[3, 1, 8]]]
    skipping = SequenceReader(dataset, "test", skip_unseen=True).read(0, 3)
    assert [sample[2] for sample in samples_of(skipping)] == [[[1, 2, 3]], [[2, 1, 3, 4]], [[3, 1]]]
    short = SequenceReader(dataset, "test", skip_unseen=True, max_length=1).read(0, 3)
    assert [sample[2] for sample in samples_of(short)] == [[[7]], [[8]], [[8]]]


@pytest.mark.parametrize("negatives", [None, NegativesConfig(count=6)])
def test_side_features_follow_the_rows(dataset: SequenceDataset, negatives: NegativesConfig | None) -> None:
    batch = SequenceReader(dataset, "train", negatives=negatives).read(0, 3)
    assert batch.sides is not None
    assert batch.sides.keys() == ["taste"]
    bags = dataset.sides["taste"]
    expected = [bags.values[bags.offsets[id] : bags.offsets[id + 1]].tolist() for id in ids_of(batch).tolist()]
    parts = torch.split(batch.sides.values(), batch.sides.lengths().tolist())
    assert [part.tolist() for part in parts] == expected
    assert expected[0] == []


def test_batches_move_whole(dataset: SequenceDataset) -> None:
    reader = SequenceReader(dataset, "train", augment=OPERATORS, negatives=NegativesConfig(count=6))
    batch = next(islice(reader.batches(16), 1, None))
    moved = batch.to(torch.device("cpu"))
    assert samples_of(moved) == samples_of(batch)
    assert (moved.first, moved.global_size, len(moved)) == (16, 16, 16)
    assert drawn_of(moved) == drawn_of(batch)


def test_what_cannot_be_read(dataset: SequenceDataset) -> None:
    with pytest.raises(ValueError, match=r"expected samples in the split 'other' of .*, got none"):
        SequenceReader(dataset, "other")
    with pytest.raises(ValueError, match=r"--sequence\.max-length: expected at least 1, got 0"):
        SequenceReader(dataset, "train", max_length=0)

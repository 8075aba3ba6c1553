"""Which actions are learned, which are held out: a sample is a user's action together with all that came before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from contrastive.data.sequence_schema import LEAST_ACTIONS, SequenceSchema, SequenceSplit
from contrastive.data.sequences import SequenceData
from dlrm.data.dataset import Array, IntArray
from dlrm.data.splits import SPLITS, TEST, TRAIN, VALID

Bounds = tuple[IntArray, IntArray]


@dataclass(frozen=True, kw_only=True)
class SequenceCuts:
    """Where the splits lie in each user's sequence.

    Attributes:
        targets: for each split (first, count), [num_users] each: the targets of a user's samples are the actions
            first, first + 1, ... of that user, counted from 0.
        train_actions: [num_users], so many of each user's first actions are in the training part, as inputs or targets.
        times: the first time that validates and the first one that tests, where the split is by time.
    """

    targets: dict[str, Bounds]
    train_actions: IntArray
    times: tuple[float, float] | None = None


def cut_sequences(data: SequenceData, schema: SequenceSchema) -> SequenceCuts:
    """Divide every user's actions; users with fewer than `min_actions` have no samples.

    Raises:
        ValueError: the split is by time and no times are known, or a part would be empty.
    """
    enough = data.lengths >= schema.min_actions
    if schema.split.by == "leave-one-out":
        cuts = _leave_one_out(data.lengths, enough)
    elif data.times is None:
        raise ValueError(
            "--schema.split.by time: expected times of the actions, got none; name their column by --schema.time"
        )
    else:
        cuts = _cut_by_time(data, data.times, schema.split, enough)
    if schema.first_actions:
        cuts = _with_first_actions(cuts)
    _check_parts(data, cuts, schema)
    return cuts


def _with_first_actions(cuts: SequenceCuts) -> SequenceCuts:
    """Learn each user's training part from its very first action on."""
    bounds = np.zeros_like(cuts.train_actions), cuts.train_actions
    return replace(cuts, targets={**cuts.targets, TRAIN: bounds})


def _leave_one_out(lengths: IntArray, enough: Array) -> SequenceCuts:
    """Return the cuts of Kang and McAuley 2018: all prefixes of the first n - 2 actions of a user are learned."""
    one, train = enough.astype(np.int64), np.where(enough, lengths - 2, 0)
    return SequenceCuts(
        targets={
            TRAIN: (one, np.maximum(train - 1, 0)),
            VALID: (train, one),
            TEST: (np.where(enough, lengths - 1, 0), one),
        },
        train_actions=train,
    )


def _cut_by_time(data: SequenceData, times: Array, split: SequenceSplit, enough: Array) -> SequenceCuts:
    valid_from, test_from = _find_cuts(times, split)
    train, held = (_count_before(data, times, cut) for cut in (valid_from, test_from))

    def targets(first: IntArray, end: IntArray) -> Bounds:
        first = np.maximum(first, 1)  # the first action of a user has no history
        counts = np.where(enough, np.maximum(end - first, 0), 0)
        return first, np.minimum(counts, 1) if split.held_out == "next" else counts

    start = np.ones_like(train)
    return SequenceCuts(
        targets={
            TRAIN: (start, np.where(enough, np.maximum(train - 1, 0), 0)),
            VALID: targets(train, held),
            TEST: targets(held, data.lengths),
        },
        train_actions=np.where(enough, train, 0),
        times=(valid_from, test_from),
    )


def _find_cuts(times: Array, split: SequenceSplit) -> tuple[float, float]:
    """Return the first times that validate and test; actions of one time stay together."""
    if split.valid_from is not None and split.test_from is not None:
        return split.valid_from, split.test_from
    ordered = np.sort(times)

    def cut(share: float) -> float:
        place = min(len(ordered) - round(len(ordered) * share), len(ordered) - 1)
        return float(ordered[place]) if share else float("inf")

    return cut(split.valid + split.test), cut(split.test)


def _count_before(data: SequenceData, times: Array, cut: float) -> IntArray:
    """Return how many actions of each user came before a time."""
    before = np.concatenate([[0], np.cumsum(times < cut)])
    counts: IntArray = before[data.offsets[1:]] - before[data.offsets[:-1]]
    return counts


def _check_parts(data: SequenceData, cuts: SequenceCuts, schema: SequenceSchema) -> None:
    counts = {split: int(cuts.targets[split][1].sum()) for split in SPLITS}
    by_time = schema.split.by == "time"
    shares = {TRAIN: 1.0, VALID: schema.split.valid, TEST: schema.split.test} if by_time else dict.fromkeys(SPLITS, 1.0)
    if all(counts[split] for split in SPLITS if shares[split]):
        return
    enough = int((data.lengths >= schema.min_actions).sum())
    cure = f"users of {max(LEAST_ACTIONS + 1, schema.min_actions)} actions and more train"
    if by_time:
        cure = "change --schema.split.valid-from and --schema.split.test-from, or the shares"
    elif schema.min_actions > LEAST_ACTIONS:
        cure += "; lower --schema.min-actions"
    raise ValueError(
        f"--schema.split: expected samples in every part, got train {counts[TRAIN]}, valid {counts[VALID]}, test "
        f"{counts[TEST]} from {len(data.users)} users, {enough} of whom have {schema.min_actions} actions or more; "
        f"{cure}"
    )

"""Crops, masks and orders are those of CL4SRec, rounded as in MCLRec's code, and all outcomes are equally likely."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.augment.draws import Draws
from contrastive.augment.operators import Augmentation, Crop, Mask, Reorder
from contrastive.data.ragged import Ragged
from contrastive.data.sequences import PAD


def as_lists(histories: Ragged) -> list[list[int]]:
    ends = np.cumsum(histories.lengths)
    return [histories.items[end - length : end].tolist() for end, length in zip(ends, histories.lengths, strict=True)]


def ragged(lists: list[list[int]]) -> Ragged:
    return Ragged(np.array([item for items in lists for item in items]), np.array([len(items) for items in lists]))


def check_crop(before: list[int], after: list[int], ratio: float) -> None:
    count = max(math.floor(len(before) * (1 - ratio)), 1)
    assert after in [before[start : start + count] for start in range(len(before) - count + 1)]


def check_mask(before: list[int], after: list[int], ratio: float) -> None:
    assert len(after) == len(before)
    assert all(new in (old, PAD) for old, new in zip(before, after, strict=True))
    assert after.count(PAD) == min(math.floor(len(before) * ratio), len(before) - 1)


def check_reorder(before: list[int], after: list[int], ratio: float) -> None:
    count = math.floor(len(before) * ratio)
    assert any(
        before[:start] == after[:start]
        and before[start + count :] == after[start + count :]
        and sorted(before[start : start + count]) == sorted(after[start : start + count])
        for start in range(len(before) - count + 1)
    )


HISTORIES = st.lists(st.lists(st.integers(1, 10**6), min_size=2, max_size=60), min_size=1, max_size=20)
RATIOS = st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99])


@given(lists=HISTORIES, ratio=RATIOS, seed=st.integers(0, 2**63 - 1))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize(("operator", "check"), [(Crop, check_crop), (Mask, check_mask), (Reorder, check_reorder)])
def test_each_view_is_a_possible_one(operator, check, lists: list[list[int]], ratio: float, seed: int) -> None:
    given_histories = ragged(lists)
    untouched = given_histories.items.copy()
    view = operator(ratio)(given_histories, Draws.of(seed, np.arange(len(lists))))
    for before, after in zip(lists, as_lists(view), strict=True):
        check(before, after, ratio)
    assert np.array_equal(given_histories.items, untouched)


def count_outcomes(operator: Augmentation, items: list[int], samples: int) -> Counter[tuple[int, ...]]:
    view = operator(ragged([items] * samples), Draws.of(7, np.arange(samples)))
    return Counter(map(tuple, as_lists(view)))


def all_orders(items: list[int], count: int) -> Counter[tuple[int, ...]]:
    """Each outcome of a shuffled stretch, with how many of (start, order) lead to it."""
    return Counter(
        (*items[:start], *order, *items[start + count :])
        for start in range(len(items) - count + 1)
        for order in permutations(items[start : start + count])
    )


def all_masks(items: list[int], count: int) -> Counter[tuple[int, ...]]:
    chosen = {frozenset(order[:count]) for order in permutations(range(len(items)))}
    return Counter(tuple(PAD if place in mask else item for place, item in enumerate(items)) for mask in chosen)


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (Crop(0.5), Counter({(1, 2, 3): 1, (2, 3, 4): 1, (3, 4, 5): 1, (4, 5, 6): 1})),
        (Mask(0.5), all_masks([1, 2, 3, 4, 5, 6], 3)),
        (Reorder(0.5), all_orders([1, 2, 3, 4, 5, 6], 3)),
        (Reorder(0.8), all_orders([1, 2, 3, 4, 5, 6], 4)),
    ],
)
def test_outcomes_are_as_likely_as_they_should_be(operator: Augmentation, expected: Counter[tuple[int, ...]]) -> None:
    samples = 20_000
    found = count_outcomes(operator, [1, 2, 3, 4, 5, 6], samples)
    assert set(found) == set(expected)
    scale = samples / expected.total()
    chi_square = sum((found[key] - count * scale) ** 2 / (count * scale) for key, count in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_rounding_is_that_of_the_published_code() -> None:
    # 10 * (1 - 0.8) is 1.9999999999999996 in binary: one item is left, as in MCLRec's code
    assert Crop(0.8)(ragged([list(range(1, 11))]), Draws.of(0, np.arange(1))).lengths.tolist() == [1]
    two = ragged([[5, 6]])
    assert len(as_lists(Crop()(two, Draws.of(0, np.arange(1))))[0]) == 1
    assert as_lists(Mask()(two, Draws.of(0, np.arange(1))))[0].count(PAD) == 1
    assert as_lists(Reorder()(two, Draws.of(0, np.arange(1))))[0] == [5, 6]


@pytest.mark.parametrize(
    ("operator", "ratio", "expected"),
    [(Crop, 1.0, r"in \[0, 1\), got 1\.0"), (Mask, -0.1, r"in \[0, 1\)"), (Reorder, 1.1, r"in \[0, 1\], got 1\.1")],
)
def test_shares_that_cannot_be(operator: type[Crop | Mask | Reorder], ratio: float, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{operator.__name__}: expected a ratio {expected}"):
        operator(ratio)


@pytest.mark.parametrize("operator", [Crop(0.0), Mask(0.0), Reorder(0.0)])
def test_a_share_of_nothing_changes_nothing(operator: Augmentation) -> None:
    lists = [[3, 1], [5, 5, 2, 9]]
    assert as_lists(operator(ragged(lists), Draws.of(1, np.arange(2)))) == lists

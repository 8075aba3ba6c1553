"""Each sample has two views by two different operators, the same ones in whatever batch it comes."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from contrastive.augment.draws import Draws
from contrastive.augment.operators import Augmentation, Crop, Mask, Reorder
from contrastive.augment.views import draw_views
from contrastive.data.ragged import Ragged


class Stamp:
    """Puts a number in the place of every item, which says who was here."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, histories: Ragged, draws: Draws) -> Ragged:
        assert (histories.lengths > 1).all()
        return Ragged(np.full(int(histories.lengths.sum()), self.number), histories.lengths)


def make_histories(count: int, seed: int = 0) -> Ragged:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 51, count)
    return Ragged(rng.integers(1, 1000, int(lengths.sum())), lengths)


def split(histories: Ragged) -> list[list[int]]:
    return [part.tolist() for part in np.split(histories.items, np.cumsum(histories.lengths)[:-1])]


def test_two_different_operators_in_every_order() -> None:
    count = 6000
    histories = Ragged(np.tile([8, 9], count), np.full(count, 2))
    views = draw_views([Stamp(1), Stamp(2), Stamp(3)], histories, Draws.of(0, np.arange(count)))
    pairs = Counter(zip(views[0].items[::2].tolist(), views[1].items[::2].tolist(), strict=True))
    assert set(pairs) == set(permutations([1, 2, 3], 2))
    assert all(abs(times - 1000) < 5 * np.sqrt(1000 * 5 / 6) for times in pairs.values())


def test_one_operator_serves_both_views_with_draws_of_their_own() -> None:
    histories = Ragged(np.tile(np.arange(1, 41), 50), np.full(50, 40))
    first, second = draw_views([Reorder()], histories, Draws.of(0, np.arange(50)))
    assert all(a != b for a, b in zip(split(first), split(second), strict=True))


def test_a_history_of_one_item_is_its_own_view() -> None:
    histories = Ragged(np.array([4, 5, 6, 7]), np.array([1, 2, 1]))
    for view in draw_views([Stamp(0)], histories, Draws.of(0, np.arange(3))):
        assert split(view) == [[4], [0, 0], [7]]
    alone = draw_views([Stamp(0)], Ragged(np.array([4]), np.array([1])), Draws.of(0, np.arange(1)))
    assert [split(view) for view in alone] == [[[4]], [[4]]]


@pytest.mark.parametrize("operators", [(Crop(), Mask(), Reorder()), (Mask(), Crop()), (Crop(),)])
def test_views_do_not_depend_on_the_batch(operators: tuple[Augmentation, ...]) -> None:
    histories, draws = make_histories(300), Draws.of(11, np.arange(300))
    whole = [split(view) for view in draw_views(operators, histories, draws)]
    some = np.random.default_rng(1).permutation(300)[:77]
    part = [split(view) for view in draw_views(operators, histories.take(some), draws.take(some))]
    assert part == [[view[sample] for sample in some] for view in whole]
    other = [split(view) for view in draw_views(operators, histories, Draws.of(12, np.arange(300)))]
    assert other != whole


def test_no_histories_have_no_views() -> None:
    empty = Ragged(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    assert [len(view.lengths) for view in draw_views([Crop(), Mask()], empty, Draws.of(0, np.arange(0)))] == [
        0,
        0,
    ]


def too_few(histories: Ragged, draws: Draws) -> Ragged:
    return Ragged(histories.items[:1], histories.lengths[:1])


def nothing_left(histories: Ragged, draws: Draws) -> Ragged:
    return Ragged(histories.items[:0], histories.lengths * 0)


def below_the_catalogue(histories: Ragged, draws: Draws) -> Ragged:
    return Ragged(histories.items - 1000, histories.lengths)


@pytest.mark.parametrize("operator", [too_few, nothing_left])
def test_an_operator_that_breaks_its_promise_is_named(operator: Augmentation) -> None:
    with pytest.raises(ValueError, match=rf"expected .*{operator.__name__}.* histories of at least one item"):
        draw_views([operator], make_histories(9), Draws.of(0, np.arange(9)))


def test_an_operator_that_gives_no_ids_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected .*below_the_catalogue.* to give ids of items, got -\d+$"):
        draw_views([below_the_catalogue], make_histories(9), Draws.of(0, np.arange(9)))

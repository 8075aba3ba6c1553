"""Recommendations are the best items that are left; an item is not its own neighbour."""

from __future__ import annotations

import pytest
import torch

from contrastive.ranking.ranks import Seen
from contrastive.ranking.recommend import find_nearest, recommend_items


def test_best_items_come_first_without_what_was_seen() -> None:
    items = torch.tensor([[9.0], [4.0], [1.0], [3.0], [2.0]])
    top = recommend_items(torch.tensor([[1.0], [-1.0]]), items, 3)
    assert top.items.tolist() == [[1, 3, 4], [2, 4, 3]]
    assert top.scores.tolist() == [[4.0, 3.0, 2.0], [-1.0, -2.0, -3.0]]
    seen = Seen(torch.tensor([0, 1, 4]), torch.tensor([1, 2, 3, 4]))
    top = recommend_items(torch.tensor([[1.0], [-1.0]]), items, 3, seen)
    assert top.items.tolist() == [[3, 4, 2], [1, 0, 0]]
    assert top.scores[1].tolist() == [-4.0, -torch.inf, -torch.inf]


def test_more_than_there_are() -> None:
    top = recommend_items(torch.ones(1, 1), torch.tensor([[9.0], [1.0], [2.0]]), 4)
    assert top.items.tolist() == [[2, 1, 0, 0]]
    with pytest.raises(ValueError, match="at least one item to recommend, got 0"):
        recommend_items(torch.ones(1, 1), torch.ones(3, 1), 0)


def test_nearest_items() -> None:
    items = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.1], [5.0, 5.0], [0.0, 1.0], [0.0, 0.0]])
    by_angle = find_nearest(items, torch.tensor([1, 4]), 4)
    assert by_angle.items.tolist() == [[2, 3, 4, 5], [3, 2, 1, 5]]
    assert by_angle.scores[0].tolist() == pytest.approx([2 / (4 + 0.01) ** 0.5, 0.5**0.5, 0.0, 0.0])
    by_product = find_nearest(items, torch.tensor([1]), 2, by="dot")
    assert by_product.items.tolist() == [[3, 2]]
    with pytest.raises(ValueError, match=r"expected an item in \[1, 6\), got 0"):
        find_nearest(items, torch.tensor([2, 0]), 1)


def test_nearest_items_of_many() -> None:
    items = torch.randn(700, 16)
    ids = torch.randint(1, 700, (50,))
    nearest = find_nearest(items, ids, 10)
    unit = torch.nn.functional.normalize(items.double(), dim=1)
    cosines = unit[ids] @ unit.T
    cosines[:, 0] = -2
    cosines[torch.arange(50), ids] = -2
    values, expected = cosines.topk(10)
    assert torch.equal(nearest.items, expected)
    torch.testing.assert_close(nearest.scores, values, rtol=0, atol=1e-6)

"""Ranks are those of the definition, to the last tie, whatever the blocks, threads and precision of products."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from contrastive.ranking import ranks
from contrastive.ranking.ranks import Ranking, Seen, rank_items
from dlrm.diverged import DivergedError


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_seen(every: list[list[int]]) -> Seen:
    lengths = torch.tensor([0, *map(len, every)])
    return Seen(lengths.cumsum(0), torch.tensor([i for items in every for i in items], dtype=torch.int64))


def assert_same(one: Ranking, other: Ranking) -> None:
    for name in ("ranks", "ties", "items", "scores"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, msg=name)


def check(vectors: Tensor, items: Tensor, targets: Tensor, seen: list[list[int]] | None, rank: Any, top: int) -> None:
    """Compare a ranking with the reference's, user by user."""
    found = rank_items(vectors, items, targets=targets, top=top, seen=make_seen(seen) if seen else None)
    for user in range(len(vectors)):
        expected = rank(vectors[user].numpy(), items.numpy(), int(targets[user]), seen[user] if seen else ())
        assert (int(found.ranks[user]), int(found.ties[user])) == expected[:2]
        assert [i for i in found.items[user].tolist() if i] == expected[2][:top]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("integers", [False, True])
def test_against_sorting(rank_by_sorting: Any, filtered: bool, integers: bool) -> None:
    # More than one block of either kind; whole numbers tie by the dozen, and are exact in any arithmetic.
    generator = torch.Generator().manual_seed(3)
    users, num_items, dim = 530, 2100, 5
    vectors, items = torch.randn(users, dim, generator=generator), torch.randn(num_items + 1, dim, generator=generator)
    if integers:
        vectors, items = vectors.round(), items.round()
    targets = torch.randint(1, num_items + 1, (users,), generator=generator)
    seen = None
    if filtered:
        seen = [torch.randint(0, num_items + 1, (i % 40,), generator=generator).tolist() for i in range(users)]
        seen[7] = [int(targets[7])] * 2  # somebody comes back to an item
        seen[8] = list(range(num_items + 1))  # and nothing else is left
    check(vectors, items, targets, seen, rank_by_sorting, top=20)


def test_ties_count_against_the_target() -> None:
    items = torch.tensor([[9.0], [1.0], [2.0], [2.0], [2.0], [3.0]])
    ranking = rank_items(torch.ones(5, 1), items, targets=torch.tensor([1, 2, 3, 4, 5]), top=3)
    assert ranking.ranks.tolist() == [5, 4, 4, 4, 1]
    assert ranking.ties.tolist() == [0, 2, 2, 2, 0]
    assert ranking.items[0].tolist() == [5, 2, 3]


def test_pad_never_ranks() -> None:
    items = torch.tensor([[100.0], [1.0], [2.0]])
    ranking = rank_items(torch.ones(1, 1), items, targets=torch.tensor([2]), top=3)
    assert ranking.ranks.tolist() == [1]
    assert ranking.items.tolist() == [[2, 1, 0]]
    assert ranking.scores.tolist() == [[2.0, 1.0, -torch.inf]]


@pytest.mark.parametrize("filtered", [False, True])
def test_vectors_that_have_collapsed(filtered: bool) -> None:
    # All items score the same, though the last bits of their products need not be: no target may look good by chance.
    num_items = 3000
    items = torch.randn(1, 61).repeat(num_items + 1, 1)
    vectors, targets = torch.randn(40, 61), torch.arange(50, 90)
    seen = make_seen([[1, 3, 60, 0]] * 40) if filtered else None
    ranking = rank_items(vectors, items, targets=targets, top=10, seen=seen)
    hidden = torch.where(targets == 60, 2, 3) if filtered else torch.zeros(40, dtype=torch.int64)
    assert ranking.ranks.tolist() == (num_items - hidden).tolist()
    assert torch.equal(ranking.ties, ranking.ranks - 1)
    first = [2, 4, 5, 6, 7, 8, 9, 10, 11, 12] if filtered else list(range(1, 11))
    assert ranking.items.tolist() == [first] * 40


def test_nearly_collapsed_vectors_are_told_apart(rank_by_sorting: Any) -> None:
    # Scores that differ in the eighth digit and beyond: float32 products mix them up.
    generator = torch.Generator().manual_seed(5)
    items = torch.ones(1501, 16) + 1e-6 * torch.randn(1501, 16, generator=generator)
    vectors = 1 + 0.1 * torch.randn(30, 16, generator=generator)
    targets = torch.randint(1, 1501, (30,), generator=generator)
    products = (vectors @ items.T).double() - vectors.double() @ items.T.double()
    assert products.abs().max() > 1e-7
    check(vectors, items, targets, None, rank_by_sorting, top=10)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_scores_sorted_by_item(rank_by_sorting: Any, order: str) -> None:
    scores = torch.arange(1201.0)[:, None] * (1 if order == "ascending" else -1)
    check(torch.ones(2, 1), scores, torch.tensor([1, 600]), None, rank_by_sorting, top=7)


def test_blocks_threads_and_precision_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, items = torch.randn(300, 33), torch.randn(2500, 33)
    items[1000:1200] = items[1:201]
    targets = torch.randint(1, 2500, (300,))
    asked: dict[str, Any] = {"targets": targets, "top": 50, "seen": make_seen([[5, 1005, 2000]] * 300)}
    whole = rank_items(vectors, items, **asked)
    assert whole.ties.sum() > 10
    torch.set_num_threads(2)
    assert_same(rank_items(vectors, items, **asked), whole)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same(rank_items(vectors, items, **asked), whole)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(ranks, "_USERS", 7)
    monkeypatch.setattr(ranks, "_ITEMS", 101)
    assert_same(rank_items(vectors, items, **asked), whole)


def test_sizes_of_vectors_do_not_matter(rank_by_sorting: Any) -> None:
    for scale in (0.0, 1e-30, 1e-18, 1e15):
        vectors, items = scale * torch.randn(9, 12), scale * torch.randn(700, 12)
        check(vectors, items, torch.arange(1, 10), None, rank_by_sorting, top=5)


MEMORY = """
from pathlib import Path
import torch
from contrastive.ranking.ranks import rank_items
torch.set_num_threads(1)
vectors, items = torch.randn(600, 8), torch.randn(300_001, 8)
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
targets = torch.arange(1, 601)
rank_items(vectors, items[:2_000], targets=targets, top=50)  # compiles
before = peak()
ranking = rank_items(vectors, items, targets=targets, top=50)
print(peak() - before)
scores = vectors[:3].double() @ items.double().T
scores[:, 0] = -torch.inf
own = scores.gather(1, targets[:3, None])
assert ranking.ranks[:3].tolist() == (scores >= own).sum(1).tolist()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process's own memory is read of Linux")
def test_memory_does_not_grow_with_the_catalogue() -> None:
    shown = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    assert int(shown.stdout) < 64 << 10  # KiB; all scores would be 720 MB, and those of a block of users 614


def test_only_what_is_asked_for() -> None:
    vectors, items = torch.randn(3, 4), torch.randn(10, 4)
    without_targets = rank_items(vectors, items, top=2)
    assert without_targets.ranks.shape == (0,)
    without_top = rank_items(vectors, items, targets=torch.tensor([1, 2, 3]))
    assert without_top.items.shape == (3, 0)
    both = rank_items(vectors, items, targets=torch.tensor([1, 2, 3]), top=2)
    assert torch.equal(both.items, without_targets.items)
    assert torch.equal(both.ranks, without_top.ranks)
    assert rank_items(vectors[:0], items, top=2).items.shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.tensor([1, 0, 2])}, r"targets\[1\]: expected an item in \[1, 10\), got 0"),
        ({"targets": torch.tensor([1, 2, 10])}, r"targets\[2\]: expected an item in \[1, 10\), got 10"),
        ({"targets": torch.tensor([1, 2])}, r"targets: expected shape \[3\], got \[2\]"),
        ({"seen": Seen(torch.tensor([0, 1, 1, 2]), torch.tensor([3, 11]))}, r"seen.items\[1\]: .* got 11"),
        ({"seen": Seen(torch.tensor([0, 2, 1, 2]), torch.tensor([3, 4]))}, "seen.offsets: expected ascending"),
        ({"seen": Seen(torch.tensor([0, 2]), torch.tensor([3, 4]))}, r"seen.offsets: expected shape \[4\], got \[2\]"),
        ({"top": -1}, "top: expected 0 or more, got -1"),
        ({"vectors": torch.ones(3, 5)}, r"got shapes \[3, 5\] and \[10, 4\]"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = {"vectors": torch.ones(3, 4), "items": torch.ones(10, 4), **changes}
    with pytest.raises(ValueError, match=message):
        rank_items(arguments.pop("vectors"), arguments.pop("items"), **arguments)


def test_a_model_that_has_diverged_is_not_ranked() -> None:
    good = torch.ones(10, 4)
    for number in (torch.nan, torch.inf):
        broken = good.clone()
        broken[6, 2] = number
        with pytest.raises(DivergedError, match=r"items' vectors: .* row 6 and 0 more"):
            rank_items(good, broken, top=1)
        with pytest.raises(DivergedError, match=r"users' vectors: .* row 6"):
            rank_items(broken, good, top=1)
    with pytest.raises(DivergedError, match="scores that float32 can hold"):
        rank_items(1e20 * good, 1e20 * good, top=1)

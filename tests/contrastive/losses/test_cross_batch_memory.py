"""The memory holds what earlier batches said, as constants, in a ring; a run that is resumed has the same."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from contrastive.losses.cross_batch_memory import CrossBatchMemory

SIZE, DIM, BATCH, TEMPERATURE = 20, 4, 3, 0.7


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(count, 2, BATCH, DIM, generator=generator)
    return [(first.clone().requires_grad_(), second.clone().requires_grad_()) for first, second in drawn]


def naive_losses(views: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Each vector against the last SIZE that were seen, those of its own batch included and itself not."""
    seen: list[tuple[int, int, Tensor]] = []
    losses = []
    for step, pair in enumerate(views):
        seen += [(step, i % BATCH, vector.detach()) for i, vector in enumerate(torch.cat(pair))]
        seen = seen[-SIZE:]
        own = len(seen) - 2 * BATCH
        terms = []
        for i, vector in enumerate(torch.cat(pair)):
            others = [(place, entry) for place, entry in enumerate(seen) if place != own + i]
            products = [torch.dot(vector, entry[2]) / TEMPERATURE for _, entry in others]
            right = next(n for n, (_, entry) in enumerate(others) if entry[:2] == (step, i % BATCH))
            terms.append(torch.logsumexp(torch.stack(products), 0) - products[right])
        losses.append(sum(terms) / len(terms))
    return losses


def test_values_and_gradients_are_those_of_a_list_of_seen_vectors() -> None:
    views = batches(8)  # 48 vectors: the ring goes round twice, and cuts through a batch
    memory = CrossBatchMemory(DIM, SIZE, TEMPERATURE)
    for pair, expected in zip(views, naive_losses(views), strict=True):
        got = memory(*pair)
        torch.testing.assert_close(got, expected)
        for ours, theirs in zip(torch.autograd.grad(got, pair), torch.autograd.grad(expected, pair), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("before", [1, 3, 5])
def test_a_resumed_run_remembers_the_same(before: int) -> None:
    views = batches(8)
    memory = CrossBatchMemory(DIM, SIZE, TEMPERATURE)
    losses = [memory(*pair).item() for pair in views]
    first = CrossBatchMemory(DIM, SIZE, TEMPERATURE)
    for pair in views[:before]:
        first(*pair)
    second = CrossBatchMemory(DIM, SIZE, TEMPERATURE)
    second.load_state_dict({name: part.clone() for name, part in first.state_dict().items()})
    assert [second(*pair).item() for pair in views[before:]] == losses[before:]


def test_a_memory_too_small_for_a_batch_is_told() -> None:
    with pytest.raises(ValueError, match=r"--mclrec.memory-size: expected at least the 6 vectors of a batch, got 5"):
        CrossBatchMemory(DIM, 5)(*batches(1)[0])


def test_a_missing_library_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(ImportError, match=r"pip install 'recforge\[contrastive\]'"):
        CrossBatchMemory(DIM, SIZE)

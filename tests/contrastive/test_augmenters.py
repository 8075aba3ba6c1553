"""Augmenters are the published networks: widths, the length of one, and what sharing and freezing mean."""

from __future__ import annotations

import pytest
import torch

from contrastive.augmenters import Augmenters, augment_frozen


def test_sizes_are_the_published_ones() -> None:
    augmenters = Augmenters(64)
    one = 64 * 32 + 32 + 32 * 16 + 16 + 16 * 64 + 64
    assert sum(weight.numel() for weight in augmenters.parameters()) == 2 * one
    assert sum(weight.numel() for weight in Augmenters(64, shared=True).parameters()) == one


def test_views_have_a_length_of_one_and_differ() -> None:
    hidden = 8 * torch.randn(5, 64)
    first, second = Augmenters(64)(hidden, hidden)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(5))
    assert not torch.allclose(first, second)
    first, second = Augmenters(64, shared=True)(hidden, hidden)
    assert torch.equal(first, second)


def test_weights_of_zero_break_nothing() -> None:
    augmenters = Augmenters(4, (3,))
    for weight in augmenters.parameters():
        torch.nn.init.zeros_(weight)
    hidden = torch.randn(2, 4, requires_grad=True)
    first, _ = augmenters(hidden, hidden)
    first.sum().backward()
    assert torch.equal(first, torch.zeros(2, 4))
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in augmenters.parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_frozen_weights_let_gradients_through_and_take_none(shared: bool) -> None:
    augmenters = Augmenters(4, (3, 2), shared=shared)
    augmenters.first.layers[0].bias.requires_grad_(False)
    hidden = torch.randn(2, 4, requires_grad=True)
    first, second = augment_frozen(augmenters, hidden, hidden)
    live = augmenters(hidden, hidden)
    assert torch.equal(first, live[0])
    assert torch.equal(second, live[1])
    sum(view[:, 0].sum() for view in (first, second)).backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in augmenters.parameters())
    assert [weight.requires_grad for weight in augmenters.first.parameters()] == [True, False] + 4 * [True]


def test_a_failure_leaves_no_weights_frozen() -> None:
    augmenters = Augmenters(4)
    with pytest.raises(RuntimeError):
        augment_frozen(augmenters, torch.zeros(2, 5), torch.zeros(2, 5))
    assert all(weight.requires_grad for weight in augmenters.parameters())

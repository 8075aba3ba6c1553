"""Dropout of our own is as good as torch's: its share, its independence, its gradients, and it follows torch's seed."""

from __future__ import annotations

import pytest
import torch

from contrastive.encoders.build import build_encoder
from contrastive.encoders.dropout import dropout
from contrastive.encoders.encoder_config import EncoderConfig


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_a_share_is_zeroed_and_the_rest_scaled_to_keep_the_mean(share):
    torch.manual_seed(0)
    out = dropout(torch.ones(1000, 1000), share)
    # Five standard deviations of a mean of 10^6 draws.
    assert abs((out == 0).double().mean() - share) < 5 * (share * (1 - share) / 1e6) ** 0.5
    torch.testing.assert_close(
        out[out != 0], torch.tensor(1 / (1 - share)).expand(int((out != 0).sum())), rtol=1e-4, atol=0
    )


def test_masks_of_numbers_rows_and_calls_are_independent():
    torch.manual_seed(0)
    masks = torch.stack([dropout(torch.ones(4096, 64), 0.5) > 0 for _ in range(2)]).double() * 2 - 1
    bound = 5 / (4096 * 64) ** 0.5
    assert abs((masks[0] * masks[1]).mean()) < bound
    for shift in (1, 2, 3, 4, 5, 64):
        flat = masks[0].flatten()
        assert abs((flat[shift:] * flat[:-shift]).mean()) < bound
    columns = masks[0].T @ masks[0] / 4096 - torch.eye(64, dtype=torch.float64)
    assert columns.abs().max() < 6 / 4096**0.5


def test_the_gradient_is_that_of_the_mask_drawn_and_so_is_the_gradient_of_a_gradient():
    torch.manual_seed(0)
    x = torch.randn(33, 7, requires_grad=True)
    torch.manual_seed(1)
    out = dropout(x, 0.3)
    mask = out.detach() / x.detach()
    (gradient,) = torch.autograd.grad((out**3).sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, 3 * mask**3 * x.detach() ** 2)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 6 * mask**3 * x.detach())


@pytest.mark.parametrize("kind", ["sasrec", "bsarec", "gru4rec"])
def test_training_draws_anew_each_time_and_repeats_from_torch_s_state(kind):
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(kind=kind), 64, 50)
    histories = torch.randn(9, 64), torch.tensor([3, 1, 5]), torch.zeros(9, dtype=torch.bool)
    state = torch.get_rng_state()
    first, second = encoder(*histories), encoder(*histories)
    torch.set_rng_state(state)
    assert torch.equal(encoder(*histories), first)
    assert not torch.equal(first, second)
    encoder.eval()
    state = torch.get_rng_state()
    assert torch.equal(encoder(*histories), encoder(*histories))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_share_nothing_is_drawn():
    state = torch.get_rng_state()
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)

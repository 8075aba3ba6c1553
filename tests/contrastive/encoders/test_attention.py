"""Attention by kernels and by torch: the same with dropout in it, its gradients, threads, second derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from contrastive.encoders import bucketed_attention, jagged_attention
from contrastive.encoders.build import build_encoder
from contrastive.encoders.encoder_config import EncoderConfig
from contrastive.encoders.jagged import lay_out

LENGTHS = torch.tensor([1, 7, 50, 3, 20])
HIDDEN = torch.arange(int(LENGTHS.sum())) % 3 == 1


def difference_quotient(function, inputs, directions, step):
    ahead, behind = ([x + sign * step * d for x, d in zip(inputs, directions, strict=True)] for sign in (1, -1))
    return (function(*ahead) - function(*behind)) / (2 * step)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("which", ["attend", "attend_from_last"])
def test_gradients_of_kernels_are_those_of_what_they_compute_with_dropout(which, share):
    torch.manual_seed(0)
    layout = lay_out(LENGTHS, HIDDEN, 50, padded=False)
    shapes = [(81, 192)] if which == "attend" else [(5, 2, 64), (81, 64)]
    inputs = [torch.randn(shape) for shape in shapes]
    weights = torch.randn(81, 64) if which == "attend" else torch.randn(5, 2, 65)

    def value(*parts):
        torch.manual_seed(3)  # the same mask each time
        if which == "attend":
            out = jagged_attention.attend(parts[0], layout, 2, share)
        else:
            sums, mass = jagged_attention.attend_from_last(*parts, layout, share)
            out = torch.cat([sums, mass[:, :, None]], dim=2)
        return (out.double() * weights).sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(value(*leaves), leaves)
    for seed in range(3):
        torch.manual_seed(10 + seed)
        directions = [torch.randn_like(x) for x in inputs]
        slope = sum((g.double() * d).sum() for g, d in zip(gradients, directions, strict=True))
        torch.testing.assert_close(
            difference_quotient(value, inputs, directions, 1e-2), slope, rtol=5e-3, atol=5e-3 * math.sqrt(81)
        )


def test_dropout_of_attention_leaves_its_mean():
    torch.manual_seed(0)
    projected, vectors = torch.randn(81, 192), torch.randn(81, 64)
    queries = torch.randn(5, 2, 64) / 8
    jagged, padded = lay_out(LENGTHS, HIDDEN, 50, padded=False), lay_out(LENGTHS, HIDDEN, 50)
    real = torch.ones(len(padded.positions), dtype=torch.bool) if padded.real is None else padded.real
    exact = bucketed_attention.attend(projected[padded.sources], padded, 2, 0.0)
    plain = torch.empty(81, 64)
    plain[padded.sources[real]] = exact[real]
    draws = torch.stack([jagged_attention.attend(projected, jagged, 2, 0.5) for _ in range(400)])
    error = draws.mean(0) - plain
    assert (error.abs() < 6 * draws.std(0) / 20 + 1e-4).all()
    assert draws.std(0).mean() > 0.1
    sums, mass = jagged_attention.attend_from_last(queries, vectors, jagged, 0.0)
    torch.testing.assert_close(mass, torch.ones(5, 2))
    both = [jagged_attention.attend_from_last(queries, vectors, jagged, 0.5) for _ in range(400)]
    many, masses = (torch.stack(part) for part in zip(*both, strict=True))
    assert ((many.mean(0) - sums).abs() < 6 * many.std(0) / 20 + 1e-4).all()
    assert ((masses.mean(0) - 1).abs() < 6 * masses.std(0) / 20).all()


@pytest.mark.parametrize("kind", ["sasrec", "bsarec"])
def test_threads_change_nothing(kind):
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(kind=kind), 64, 50)
    lengths = torch.randint(1, 9, (300,))
    histories = torch.randn(int(lengths.sum()), 64), lengths, torch.zeros(int(lengths.sum()), dtype=torch.bool)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(5)
            results.append(encoder(*histories))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_torch_s_operators_have_second_derivatives_and_kernels_say_that_they_have_none():
    histories = torch.randn(9, 64), torch.tensor([3, 1, 5]), torch.zeros(9, dtype=torch.bool)

    def second_derivative(kernels):
        torch.manual_seed(0)
        encoder = build_encoder(EncoderConfig(kernels=kernels), 64, 50)
        weight = encoder.positions.weight
        (gradient,) = torch.autograd.grad(encoder(*histories).sin().sum(), weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)[0]

    assert second_derivative("torch").abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"--encoder\.kernels torch"):
        second_derivative("auto")


def test_widths_that_fill_no_registers_are_left_to_torch():
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(heads=2), 20, 50)
    out = encoder(torch.randn(4, 20), torch.tensor([1, 3]), torch.zeros(4, dtype=torch.bool))
    assert out.shape == (2, 20)
    assert out.isfinite().all()


def test_autocast_runs_on_torch_s_operators():
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 64, 50).eval()
    histories = torch.randn(9, 64), torch.tensor([3, 1, 5]), torch.zeros(9, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(*histories)
    torch.testing.assert_close(half.float(), encoder(*histories), rtol=0.05, atol=0.1)

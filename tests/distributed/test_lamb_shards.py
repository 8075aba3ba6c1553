"""LAMB on pieces of tensors that lie on several ranks moves them as LAMB in one process moves the whole ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dlrm.distributed.ranks import Ranks
from dlrm.optim.lamb import Lamb
from dlrm.optim.ratio_check import check_ratios_agree

STEPS = 20
SHAPES = [(12, 10), (9,), (7, 4), (5, 3)]
# whole, rows (of which one rank has none in the end), columns
CUTS = {0: 0, 1: 0, 2: 1}


def problem():
    generator = torch.Generator().manual_seed(3)
    weights = [0.3 * torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [
        [torch.randn(shape, generator=generator) * 10.0**-i for i, shape in enumerate(SHAPES)] for _ in range(STEPS)
    ]
    return weights, gradients


def cut(tensors, rank, count):
    """Give a rank's pieces: rows, entries, columns; the last tensor is whole."""
    return [
        tensor.tensor_split(count, CUTS[i])[rank].contiguous() if i in CUTS else tensor.clone()
        for i, tensor in enumerate(tensors)
    ]


def train_pieces(rank, count, fused, sharded, max_grad_norm=None):
    """Train a rank's pieces; its pieces have no gradient in one step, which for the whole means zeros."""
    weights, gradients = problem()
    pieces = [torch.nn.Parameter(piece) for piece in cut(weights, rank, count)]
    options = {"lr": 0.05, "weight_decay": 0.1, "exclude_1d": False, "fused": fused, "max_grad_norm": max_grad_norm}
    groups = [{"params": pieces[: len(CUTS)], "sharded": sharded}, {"params": pieces[len(CUTS) :]}]
    optimizer, ratios = Lamb(groups, **options), []
    for step, whole in enumerate(gradients):
        for place, (piece, gradient) in enumerate(zip(pieces, cut(whole, rank, count), strict=True)):
            piece.grad = None if step == 4 and rank == 1 and place == 1 else gradient
        optimizer.step()
        ratios.append(optimizer.ratios.tolist())
    return [piece.detach().numpy() for piece in pieces], ratios


def train_whole(max_grad_norm=None):
    weights, gradients = problem()
    params = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = Lamb(params, lr=0.05, weight_decay=0.1, exclude_1d=False, fused=False, max_grad_norm=max_grad_norm)
    for step, whole in enumerate(gradients):
        for place, (param, gradient) in enumerate(zip(params, whole, strict=True)):
            param.grad = gradient.clone()
            if step == 4 and place == 1:
                param.grad.tensor_split(2)[1].zero_()
        optimizer.step()
    return [param.detach().numpy() for param in params]


def largest_difference(results, max_grad_norm=None):
    (first, _), (second, _) = results
    whole = train_whole(max_grad_norm)
    joined = [
        np.concatenate([a, b], CUTS[i]) if i in CUTS else a for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    return max(float(np.abs(a - b).max()) for a, b in zip(joined, whole, strict=True))


def step_and_check(ranks, differs):
    """Take a step on a replicated network, one number of whose second layer may differ a little on rank 1."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 1))
    for param in network.parameters():
        param.grad = torch.rand_like(param) + 0.5
    if differs and ranks.rank == 1:
        network[1].weight.data[0, 2] *= 1.0001
    optimizer = Lamb(network.named_parameters(), lr=0.1)
    optimizer.step()
    try:
        check_ratios_agree(optimizer, ranks)
    except ValueError as error:
        return str(error)
    return ""


def run_rank(rank, count):
    """Do all that is asked of ranks here, as it takes them long to start."""
    kinds = [(True, True), (False, True), (True, False), (True, True, 0.5)]
    trained = [train_pieces(rank, count, *kind) for kind in kinds]
    ranks = Ranks(rank=rank, count=count)
    return trained, [step_and_check(ranks, differs) for differs in (False, True)]


@pytest.fixture(scope="module")
def results(run_ranks):
    """What two ranks have found."""
    return run_ranks(run_rank, 2)


def test_pieces_move_as_the_whole_and_not_with_their_own_norms(results):
    fused, operations, local, clipped = zip(*[trained for trained, _ in results], strict=True)
    for of_ranks in (fused, operations):
        assert largest_difference(of_ranks) < 1e-6
        assert of_ranks[0][1] == of_ranks[1][1], "ratios are the same on both ranks, bit for bit"
    assert largest_difference(local) > 1e-2
    assert largest_difference(clipped, max_grad_norm=0.5) < 1e-6
    assert largest_difference(clipped) > 1e-4


def test_ratios_that_differ_over_ranks_are_told(results):
    for _, (agreeing, differing) in results:
        assert agreeing == ""
        assert differing == results[0][1][1]
        assert "on rank 1" in differing
        assert "for 1.weight, rank 0" in differing

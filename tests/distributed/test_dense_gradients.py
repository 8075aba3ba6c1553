"""Gradients of dense weights are summed over ranks, of every type and in every order of messages."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dlrm.distributed.parallelize import Control, DenseReducer
from dlrm.distributed.ranks import Ranks


def sum_gradients(rank, count):
    """Send gradients of several types in many small messages; one parameter is used by nobody, one by rank 0 alone."""
    torch.manual_seed(0)
    shapes = [(3, 5), (7,), (40, 3), (), (2, 2), (6,)]
    types = [torch.float32, torch.float64, torch.float32, torch.float32, torch.float32, torch.bfloat16]
    parameters = [nn.Parameter(torch.randn(s).to(t)) for s, t in zip(shapes, types, strict=True)]
    reducer, found = DenseReducer(parameters, Ranks(rank=rank, count=count), bucket_bytes=64), []
    for step in range(3):
        reducer.begin(Control(loss=rank + step, samples=10**6 + rank, asked_to_stop=rank == 1))
        used = [0, 1, 2, 5] + [3] * (rank == 0)
        sum((parameters[i].double() ** 2).sum() * (rank + 1) * (step + 1) for i in used).backward()
        control = reducer.finish()
        found.append((control, [None if p.grad is None else p.grad.double().numpy().copy() for p in parameters]))
    return found, [p.detach().double().numpy() for p in parameters]


def test_gradients_are_sums_over_ranks(run_ranks):
    count = 3
    for found, parameters in run_ranks(sum_gradients, count):
        for step, (control, gradients) in enumerate(found):
            assert control.samples == count * 10**6 + count * (count - 1) // 2
            assert control.loss == count * (count - 1) // 2 + count * step
            assert control.asked_to_stop == 1
            weights = sum(range(1, count + 1)) * (step + 1)
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                expected = {3: step + 1, 4: None}.get(number, weights)
                if expected is None:
                    assert gradient is None
                else:
                    np.testing.assert_allclose(gradient, 2 * expected * parameter, rtol=0.02 if number == 5 else 1e-6)

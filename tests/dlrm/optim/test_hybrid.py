"""A hybrid does what its members would do on their own, and is saved and restored as one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer

from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.optim.hybrid import HybridOptimizer
from dlrm.optim.lamb import Lamb


def make_weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (3,), (2, 4), (5,)]]


def make_members(weights: list[torch.nn.Parameter]) -> list[Optimizer]:
    return [
        Lamb([{"params": weights[:1], "name": "dense"}, {"params": weights[1:2], "name": "vectors"}], lr=0.1),
        SGD([{"params": weights[2:3], "name": "head"}], lr=0.2, momentum=0.9),
        Adam([{"params": weights[3:], "name": "more"}], lr=0.3, amsgrad=True),
    ]


def train(weights: list[torch.nn.Parameter], optimizers: list[Optimizer], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_it_does_what_its_members_do() -> None:
    together, apart = make_weights(), make_weights()
    train(together, [HybridOptimizer(make_members(together))], range(5))
    train(apart, make_members(apart), range(5))
    assert all(map(torch.equal, together, apart))


def test_groups_keep_their_names_and_their_rates_are_the_members() -> None:
    weights = make_weights()
    hybrid = HybridOptimizer(make_members(weights))
    assert [group["name"] for group in hybrid.param_groups] == ["dense", "vectors", "head", "more"]
    before = [weight.detach().clone() for weight in weights]
    for group in hybrid.param_groups:
        group["lr"] *= group["name"] == "head"
    train(weights, [hybrid], range(1))
    moved = [not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)]
    assert moved == [False, False, True, False]


def test_it_goes_on_from_a_checkpoint(tmp_path) -> None:
    weights = make_weights()
    hybrid = HybridOptimizer(make_members(weights))
    train(weights, [hybrid], range(3))
    store = CheckpointStore(tmp_path)
    store.save({"optimizer": hybrid.state_dict(), "weights": [w.detach().clone() for w in weights]}, samples=3)
    store.wait()
    train(weights, [hybrid], range(3, 6))

    restored = store.restore_latest()
    assert restored is not None
    others = [torch.nn.Parameter(weight.clone()) for weight in restored.state["weights"]]
    resumed = HybridOptimizer(make_members(others))
    resumed.load_state_dict(restored.state["optimizer"])
    for group in resumed.param_groups:
        group["lr"] *= 1.0  # as a schedule would
    train(others, [resumed], range(3, 6))
    assert all(map(torch.equal, weights, others))
    assert len(resumed.state) == len(hybrid.state) == len(weights)


def test_rates_set_after_loading_are_the_members() -> None:
    weights = make_weights()
    hybrid = HybridOptimizer(make_members(weights))
    hybrid.load_state_dict(hybrid.state_dict())
    before = [weight.detach().clone() for weight in weights]
    for group in hybrid.param_groups:
        group["lr"] = 0.0
    train(weights, [hybrid], range(1))
    assert all(map(torch.equal, weights, before))


def test_a_copy_is_independent() -> None:
    weights = make_weights()
    hybrid = HybridOptimizer(make_members(weights))
    train(weights, [hybrid], range(2))
    copied_weights, copied = copy.deepcopy((weights, hybrid))
    train(weights, [hybrid], range(2, 4))
    assert not torch.equal(copied_weights[0], weights[0])
    train(copied_weights, [copied], range(2, 4))
    assert all(map(torch.equal, copied_weights, weights))


def test_a_closure_is_called_once_and_gradients_are_zeroed() -> None:
    weights, calls = make_weights(), []
    hybrid = HybridOptimizer(make_members(weights))

    def closure() -> float:
        calls.append(1)
        hybrid.zero_grad()
        sum((weight**2).sum() for weight in weights).backward()
        return 7.0

    assert hybrid.step(closure) == 7.0
    assert len(calls) == 1
    hybrid.zero_grad()
    assert all(weight.grad is None for weight in weights)


def test_nonsense_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="at least one optimizer"):
        HybridOptimizer([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        HybridOptimizer([SGD([weight], 0.1), SGD([weight], 0.1)])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        HybridOptimizer([SGD([weight], 0.1)]).load_state_dict(
            HybridOptimizer(make_members(make_weights())).state_dict()
        )

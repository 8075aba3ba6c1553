"""A hybrid does what its members would do on their own, and is saved and restored as one."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.optim.factored import Factored
from dlrm.optim.hybrid import HybridOptimizer
from dlrm.optim.lamb import Lamb
from dlrm.optim.lars import Lars


def make_weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (3,), (2, 4), (5,)]]


def make_members(weights: list[torch.nn.Parameter]) -> list[Optimizer]:
    return [
        Lamb([{"params": weights[:1], "name": "dense"}, {"params": weights[1:2], "name": "vectors"}], lr=0.1),
        SGD([{"params": weights[2:3], "name": "head"}], lr=0.2, momentum=0.9),
        Adam([{"params": weights[3:], "name": "more"}], lr=0.3, amsgrad=True),
    ]


def test_it_does_what_its_members_do(train) -> None:
    together, apart = make_weights(), make_weights()
    train(together, [HybridOptimizer(make_members(together))], range(5))
    train(apart, make_members(apart), range(5))
    assert all(map(torch.equal, together, apart))


def test_groups_keep_their_names_and_their_rates_are_the_members(train) -> None:
    weights = make_weights()
    hybrid = HybridOptimizer(make_members(weights))
    assert [group["name"] for group in hybrid.param_groups] == ["dense", "vectors", "head", "more"]
    before = [weight.detach().clone() for weight in weights]
    for group in hybrid.param_groups:
        group["lr"] *= group["name"] == "head"
    train(weights, [hybrid], range(1))
    moved = [not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)]
    assert moved == [False, False, True, False]


def test_it_goes_on_from_a_checkpoint(train, tmp_path) -> None:
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


def test_rates_set_after_loading_are_the_members(train) -> None:
    weights = make_weights()
    hybrid = HybridOptimizer(make_members(weights))
    hybrid.load_state_dict(hybrid.state_dict())
    before = [weight.detach().clone() for weight in weights]
    for group in hybrid.param_groups:
        group["lr"] = 0.0
    train(weights, [hybrid], range(1))
    assert all(map(torch.equal, weights, before))


def test_a_copy_is_independent(train) -> None:
    weights = make_weights()
    hybrid = HybridOptimizer(make_members(weights))
    train(weights, [hybrid], range(2))
    copied_weights, copied = copy.deepcopy((weights, hybrid))
    train(weights, [hybrid], range(2, 4))
    assert not torch.equal(copied_weights[0], weights[0])
    train(copied_weights, [copied], range(2, 4))
    assert all(map(torch.equal, copied_weights, weights))


KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "lamb": lambda params: Lamb(params, 0.1),
    "lamb_16_bits": lambda params: Lamb(params, 0.1, moment_dtype=torch.bfloat16),
    "lars": lambda params: Lars(params, 10.0),
    "factored": lambda params: Factored(params, 0.1, min_dim=2),
    "sgd": lambda params: SGD(params, 0.1, momentum=0.9),
    "adamw": lambda params: AdamW(params, 0.1),
    "adagrad": lambda params: Adagrad(params, 0.1),
}


def make_pair(weights: list[torch.nn.Parameter], kinds: tuple[str, str]) -> HybridOptimizer:
    return HybridOptimizer([KINDS[kinds[0]](weights[:2]), KINDS[kinds[1]](weights[2:])])


def save_and_load(weights: list[torch.nn.Parameter], hybrid: HybridOptimizer, kinds: tuple[str, str]) -> Any:
    others = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    fresh = make_pair(others, kinds)
    fresh.load_state_dict(copy.deepcopy(hybrid.state_dict()))
    return others, fresh


COPIES: dict[str, Callable[..., tuple[list[torch.nn.Parameter], HybridOptimizer]]] = {
    "load": save_and_load,
    "deepcopy": lambda weights, hybrid, kinds: copy.deepcopy((weights, hybrid)),
    "pickle": lambda weights, hybrid, kinds: pickle.loads(pickle.dumps((weights, hybrid))),
}


@pytest.mark.parametrize("steps", [1, 3])  # after one, some weights have no state yet
@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, KINDS)), ids="-".join)
def test_any_two_kinds_go_on_bit_for_bit(kinds: tuple[str, str], steps: int, train) -> None:
    """Members hold different entries and types, and see no others' when they are loaded or copied."""
    weights = make_weights()
    hybrid = make_pair(weights, kinds)
    train(weights, [hybrid], range(steps))
    copies = {name: make(weights, hybrid, kinds) for name, make in COPIES.items()}
    train(weights, [hybrid], range(steps, steps + 3))
    for name, (others, resumed) in copies.items():
        train(others, [resumed], range(steps, steps + 3))
        assert all(map(torch.equal, weights, others)), name
        for weight, other in zip(weights, others, strict=True):
            state, expected = resumed.state[other], hybrid.state[weight]
            assert state.keys() == expected.keys(), name
            assert all(state[key].dtype == value.dtype for key, value in expected.items()), name
            assert all(torch.equal(state[key], value) for key, value in expected.items()), name


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

"""Lamb's state goes on where it was, in 16 bits too; its options are checked, its copies are independent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm.optim.lamb import Lamb


def make_params() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 13), (16,), (33, 16), (1,), (2, 3, 4)]
    return [torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes]


def copies_of(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def test_resuming_from_a_state_dict_is_bit_equal(train, tmp_path: Path) -> None:
    params = make_params()
    optimizer = Lamb(params, lr=0.01, max_grad_norm=2.0)
    train(params, [optimizer], range(7))
    resumed_params = copies_of(params)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    train(params, [optimizer], range(7, 20))

    resumed = Lamb(resumed_params, lr=0.5, max_grad_norm=2.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed_params, [resumed], range(7, 20))
    assert all(map(torch.equal, params, resumed_params))
    left_state, right_state = optimizer.state_dict(), resumed.state_dict()
    assert left_state["param_groups"] == right_state["param_groups"]
    for key, entry in left_state["state"].items():
        assert all(torch.equal(value, right_state["state"][key][name]) for name, value in entry.items())


def test_a_closure_gives_the_loss_and_the_gradients() -> None:
    param = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Lamb([param])

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 9.0
    assert closure() < 9.0


def test_options_differ_by_group_and_copies_are_independent() -> None:
    fast, slow = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([{"params": [fast], "lr": 0.1}, {"params": [slow]}], lr=0.01)
    fast.grad, slow.grad = torch.ones(2, 2), torch.ones(2, 2)
    copied = copy.deepcopy(optimizer)
    optimizer.step()
    torch.testing.assert_close(1 - fast.detach(), torch.full((2, 2), 0.1))
    torch.testing.assert_close(1 - slow.detach(), torch.full((2, 2), 0.01))
    assert not copied.state


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"eps": -1e-9}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Lamb([torch.nn.Parameter(torch.ones(2))], **options)


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        Lamb(table.parameters()).step()


def test_a_first_moment_in_16_bits_takes_a_quarter_less_and_leads_nearly_the_same_way(train) -> None:
    start, ours, theirs = make_params(), make_params(), make_params()
    narrow = Lamb(ours, lr=0.01, moment_dtype=torch.bfloat16)
    train(ours, [narrow], range(5))
    train(theirs, [Lamb(theirs, lr=0.01)], range(5))
    tensors = [t for state in narrow.state.values() for name, t in state.items() if name != "step"]
    assert sum(t.numel() * t.itemsize for t in tensors) == 6 * sum(param.numel() for param in ours)
    for param, expected, first in zip(ours, theirs, start, strict=True):
        assert not torch.equal(param, expected)
        way, apart = (expected.detach() - first.detach()).norm(), (param.detach() - expected.detach()).norm()
        assert float(apart) < 0.02 * float(way)


def test_a_first_moment_in_16_bits_is_saved_and_loaded(train) -> None:
    params = make_params()
    optimizer = Lamb(params, lr=0.01, moment_dtype=torch.bfloat16)
    train(params, [optimizer], range(5))
    others = copies_of(params)
    resumed = Lamb(others, lr=0.5, moment_dtype=torch.bfloat16)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {resumed.state[other]["exp_avg"].dtype for other in others} == {torch.bfloat16}
    for which, held in ((optimizer, params), (resumed, others)):
        train(held, [which], range(5, 9))
    assert all(map(torch.equal, params, others))


def test_a_state_of_before_the_newer_options_is_loaded(train) -> None:
    params = make_params()
    optimizer = Lamb(params, lr=0.01)
    train(params, [optimizer], range(5))
    state = copy.deepcopy(optimizer.state_dict())
    for name in ("norm_bounds", "sharded"):
        del state["param_groups"][0][name]
    resumed = Lamb(copies_of(params), lr=0.5)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["norm_bounds"] is None
    assert resumed.param_groups[0]["sharded"] is False

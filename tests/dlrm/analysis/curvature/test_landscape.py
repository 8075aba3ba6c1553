"""Directions are as long as the weights, filter by filter; lines go through both solutions, statistics included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dlrm.analysis.curvature.landscape import draw_direction, interpolate


def network(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    net(torch.randn(64, 5) * (seed + 1))
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_every_filter_of_a_direction_is_as_long_as_the_weights():
    weights = {"linear": torch.randn(6, 5), "table": torch.randn(40, 3), "bias": torch.randn(6)}
    weights["table"][7] = 0
    direction = draw_direction(weights, seed=2)
    for name in ("linear", "table"):
        torch.testing.assert_close(direction[name].norm(dim=1), weights[name].norm(dim=1))
    assert not direction["bias"].any()
    torch.testing.assert_close(draw_direction(weights, seed=2)["table"], direction["table"], rtol=0, atol=0)
    assert not torch.equal(draw_direction(weights, seed=3)["table"], direction["table"])


def test_the_scale_of_a_layer_has_no_say_in_what_a_direction_does():
    """Two ReLU layers, one ten times as large and the next a tenth, compute the same; so they do along a direction."""
    torch.manual_seed(0)
    first = {"a": torch.randn(8, 3).double(), "b": torch.randn(1, 8).double()}
    scaled = {"a": first["a"] * 10, "b": first["b"] / 10}
    numbers = torch.randn(20, 3).double()

    def compute(weights: dict[str, torch.Tensor], step: float) -> torch.Tensor:
        moved = {name: tensor + step * draw_direction(weights, 1)[name] for name, tensor in weights.items()}
        return torch.relu(numbers @ moved["a"].T) @ moved["b"].T

    assert (compute(first, 0.5) - compute(first, 0.0)).abs().max() > 0.1
    torch.testing.assert_close(compute(scaled, 0.5), compute(first, 0.5))


def test_a_line_goes_through_both_solutions_and_running_statistics_move_with_it():
    first, second = network(0), network(1)
    for share, end in ((0.0, first), (1.0, second)):
        on_line = interpolate(first, second, share)
        for name, tensor in end.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(on_line[name], tensor)
    half = interpolate(first, second, 0.5)
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(half[name], (first[name] + second[name]) / 2)
        assert not torch.equal(half[name], first[name])
    assert half["1.num_batches_tracked"].item() == 1


def test_beyond_the_ends_no_variance_is_negative():
    first, second = network(0), network(1)
    beyond = interpolate(first, second, -20.0)
    assert (21 * first["1.running_var"] - 20 * second["1.running_var"]).min() < 0
    assert beyond["1.running_var"].min() >= 0


def test_between_two_architectures_there_is_no_line():
    first, second = network(0), network(1)
    second["0.weight"] = second["0.weight"][:, :4]
    with pytest.raises(ValueError, match="expected two solutions of the same architecture"):
        interpolate(first, second, 0.5)

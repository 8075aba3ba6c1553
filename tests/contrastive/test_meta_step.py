"""The second-order meta step has the gradient of the formulas: differences of the loss after the encoder's own step."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from contrastive.augmenters import Augmenters
from contrastive.mclrec_config import MclrecConfig
from contrastive.mclrec_losses import HiddenStates, stage_loss
from contrastive.meta_step import second_order_loss

RATE = 0.3


class Encoder(nn.Module):
    """The mean row of two items, through a layer; one weight is of no use, as an encoder may have some."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.unused = nn.Parameter(torch.zeros(2))
        self.inputs = torch.randint(1, 6, (3, 3, 2), generator=torch.Generator().manual_seed(3))
        self.calls: list[bool] = []

    def forward(self, rows: Tensor, with_history: bool) -> HiddenStates:
        self.calls.append(with_history)
        history, first, second = (1.5 * torch.tanh(self.layer(rows[items].mean(1))) for items in self.inputs)
        return HiddenStates(history if with_history else None, (first, second))


class World:
    def __init__(self) -> None:
        torch.manual_seed(5)
        self.encoder = Encoder().double()
        self.augmenters = Augmenters(3, (3, 2)).double()
        self.rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        self.targets = torch.tensor([1, 4, 2])
        self.weights = dict(self.encoder.named_parameters())

    def encode(self, weights: Mapping[str, Tensor], rows: Tensor, with_history: bool) -> HiddenStates:
        out: HiddenStates = functional_call(self.encoder, dict(weights), (rows, with_history))
        return out

    def moved(self, direction: list[Tensor], length: float) -> World:
        """The same world with other augmenters."""
        other = World()
        with torch.no_grad():
            for part, way in zip(other.augmenters.parameters(), direction, strict=True):
                part += length * way
        return other

    def learn(self, config: MclrecConfig) -> list[Tensor]:
        loss = second_order_loss(self.encode, self.weights, self.rows, self.targets, self.augmenters, config).loss
        return list(torch.autograd.grad(loss, list(self.augmenters.parameters())))


@pytest.fixture
def world() -> World:
    return World()


def naive_loss_after_step(formulas: SimpleNamespace, world: World, config: MclrecConfig) -> float:
    """L_B once theta has gone down the gradient of L_A, all from the formulas."""

    def contrast(views: tuple[Tensor, Tensor], weight: float) -> Tensor:
        layers = [
            [(layer.weight.detach(), layer.bias.detach()) for layer in augmenter.layers]
            for augmenter in (world.augmenters.first, world.augmenters.second)
        ]
        z1, z2 = (formulas.augment(view, its_layers) for view, its_layers in zip(views, layers, strict=True))
        pairs = [(views[0], z2), (views[1], z1), (z1, z2)]
        if config.regulariser == "paper":
            regulariser = formulas.batch_regulariser(z1, z2)
        else:
            regulariser = sum(formulas.row_regulariser(*pair) for pair in pairs)
        return sum(formulas.info_nce(*pair) for pair in pairs) + weight * regulariser

    hidden = world.encode(world.weights, world.rows, True)
    loss = formulas.next_item(hidden.history, world.rows, world.targets)
    loss = loss + config.views_weight * formulas.info_nce(*hidden.views)
    loss = loss + config.beta * contrast(hidden.views, config.regulariser_weight)
    theta = {**world.weights, "rows": world.rows}
    gradients = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
    moved = {name: part - RATE * gradient for (name, part), gradient in zip(theta.items(), gradients, strict=True)}
    rows = moved.pop("rows")
    weight = config.regulariser_weight * (config.beta if config.regulariser == "paper" else 1.0)
    return contrast(world.encode(moved, rows, False).views, weight).item()


@pytest.mark.parametrize("regulariser", ["code", "paper"])
def test_gradient_is_the_difference_of_losses_after_the_step(
    formulas: SimpleNamespace, world: World, regulariser: str
) -> None:
    config = MclrecConfig(views_weight=0.3, beta=0.8, regulariser=regulariser, second_order=True, virtual_rate=RATE)
    got = world.learn(config)
    loss = second_order_loss(world.encode, world.weights, world.rows, world.targets, world.augmenters, config).loss
    assert loss.item() == pytest.approx(naive_loss_after_step(formulas, world, config), rel=1e-12)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in got]
        slope = sum((gradient * way).sum().item() for gradient, way in zip(got, direction, strict=True))
        ends = [naive_loss_after_step(formulas, world.moved(direction, sign * 1e-5), config) for sign in (1, -1)]
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_the_step_tells_something_that_the_first_order_does_not_know(world: World) -> None:
    config = MclrecConfig(views_weight=0.3, beta=0.8, second_order=True, virtual_rate=RATE)
    through_step = torch.cat([part.flatten() for part in world.learn(config)])
    hidden = world.encode(world.weights, world.rows, False)
    first_order = stage_loss("augmenters", hidden, world.rows, world.targets, world.augmenters, config).loss
    plain = torch.cat([part.flatten() for part in torch.autograd.grad(first_order, [*world.augmenters.parameters()])])
    assert (through_step - plain).norm() > 0.05 * plain.norm()
    still = MclrecConfig(views_weight=0.3, beta=0.8, second_order=True, virtual_rate=1e-12)
    unmoved = torch.cat([part.flatten() for part in world.learn(still)])
    torch.testing.assert_close(unmoved, plain, rtol=1e-8, atol=1e-10)


def test_nobody_but_the_augmenters_gets_a_gradient(world: World) -> None:
    config = MclrecConfig(second_order=True)
    second_order_loss(world.encode, world.weights, world.rows, world.targets, world.augmenters, config).loss.backward()
    assert all(weight.grad is not None for weight in world.augmenters.parameters())
    assert all(weight.grad is None for weight in world.encoder.parameters())
    assert world.rows.grad is None
    assert world.encoder.calls == [True, False], "histories are encoded once, for the virtual step"

"""How the master copy of the dense part moves: by a trainer's weights, by their change, or by an optimizer's step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from parameter_server.dense_codec import PIECE, Floats
from parameter_server.description import DenseMode

if TYPE_CHECKING:
    import torch

OPTIONS = "dense_options"
"""Name of the setting of a run's description that holds the server-side optimizer's options, by torch's names."""

_STATES: dict[str, tuple[str, ...]] = {
    "easgd": (),
    "average": ("velocity",),
    "sgd": ("momentum_buffer",),
    "adagrad": ("sum", "step"),
    "adam": ("exp_avg", "exp_avg_sq", "step"),
}
_SCALARS = ("step",)
_OWN_OPTIONS = {"sgd": {"lr", "momentum"}, "adagrad": {"lr", "eps"}, "adam": {"lr", "betas", "eps"}}


def pull_elastically(master: Floats, weights: Floats, alpha: np.float32) -> Floats:
    """Moves the master towards a trainer's weights, and gives by how much.

    The trainer then moves by as much towards the master: the elastic force (Zhang, Choromanska, LeCun 2015,
    arXiv:1412.6651, equations 5 and 6, in the asynchronous form of algorithm 1).

    Args:
        master: [PIECE], written.
        weights: [PIECE].
        alpha: Share of the distance, in (0, 1).
    """
    moved: Floats = alpha * (weights - master)
    master += moved
    return moved


def move_by_block(master: Floats, velocity: Floats, change: Floats, factor: np.float32, momentum: np.float32) -> None:
    """Adds a trainer's change to the master by way of a momentum.

    Chen and Huo 2016, "Scalable training of deep learning machines by incremental block training with intra-block
    parallel optimization and blockwise model-update filtering", equations 6 and 7, with one trainer's part of the mean
    at a time: over a round of n trainers with factor = rate / n the same changes come in, each with the same effect
    in the end: factor / (1 - momentum).

    Args:
        master: [PIECE], written.
        velocity: [PIECE], written.
        change: [PIECE], of the trainer's weights since it last took the master.
        factor: Of the change.
        momentum: Of the velocity, in [0, 1).
    """
    velocity *= momentum
    velocity += factor * change
    master += velocity


class ServerUpdate:
    """What a run's mode needs on the server: the states of a piece, and steps of torch's optimizers, number by number.

    The optimizer itself holds nothing between two steps: a piece's state is arrays that lie beside it.

    Args:
        mode: Of the run's dense part.
        options: Of ``sgd`` (lr, momentum), ``adagrad`` (lr, eps) or ``adam`` (lr, betas, eps); ``lr`` is 1 if not
            given, as frames' factors multiply it.

    Raises:
        ValueError: There is no such mode, or option.
    """

    def __init__(self, mode: DenseMode, options: Mapping[str, Any] | None = None) -> None:
        if mode not in get_args(DenseMode):
            raise ValueError(
                f"dense mode: expected one of {', '.join(get_args(DenseMode))}, got {mode!r}: servers update number by "
                "number; lamb and others run on the trainers, with easgd or average"
            )
        given = dict(options or {})
        if unknown := given.keys() - _OWN_OPTIONS.get(mode, set()):
            raise ValueError(f"settings, {OPTIONS}: expected options of {mode}, got {min(unknown)!r}")
        self.takes_gradients = mode in _OWN_OPTIONS
        self._states = _STATES[mode]
        self._rate = float(given.pop("lr", 1.0))
        self._optimizer = _build(mode, given) if self.takes_gradients else None

    def new_state(self) -> dict[str, Floats]:
        """Gives the state of a piece that has not been updated yet."""
        return {name: np.zeros(1 if name in _SCALARS else PIECE, np.float32) for name in self._states}

    def step(
        self, masters: Sequence[Floats], states: Sequence[Mapping[str, Floats]], gradients: Floats, factor: float
    ) -> None:
        """Takes a step.

        Args:
            masters: [n] of [PIECE], written.
            states: [n], written.
            gradients: [n, PIECE], a copy of one's own.
            factor: Multiplies the learning rate.
        """
        import torch

        assert self._optimizer is not None
        parameters = [torch.from_numpy(master) for master in masters]
        group = self._optimizer.param_groups[0]
        group["params"], group["lr"] = parameters, self._rate * factor
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            parameter.grad = torch.from_numpy(gradient)
            self._optimizer.state[parameter] = {
                name: torch.from_numpy(array.reshape(()) if name in _SCALARS else array)
                for name, array in state.items()
            }
        try:
            self._optimizer.step()
        finally:
            self._optimizer.state.clear()
            group["params"] = []


def _build(mode: DenseMode, options: dict[str, Any]) -> torch.optim.Optimizer:
    import torch

    nothing = [torch.zeros(1)]
    if mode == "sgd":
        return torch.optim.SGD(nothing, lr=1.0, **options)
    if mode == "adagrad":
        return torch.optim.Adagrad(nothing, lr=1.0, **options)
    if "betas" in options:
        options["betas"] = tuple(options["betas"])  # a description in JSON has lists
    return torch.optim.Adam(nothing, lr=1.0, **options)

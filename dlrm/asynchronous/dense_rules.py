"""What a trainer sends in an exchange of the dense part and what it does with the answer: a class for each rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch.optim import SGD, Adagrad, Adam, Optimizer

from dlrm.asynchronous.dense_average_config import DenseAverageConfig, unlike
from dlrm.asynchronous.flat_weights import FlatWeights, relative_distance
from parameter_server.client.dense_client import Part, Place
from parameter_server.dense_codec import Combine, Floats

_KINDS: dict[type[Optimizer], str] = {SGD: "sgd", Adagrad: "adagrad", Adam: "adam"}


class Sent(NamedTuple):
    """What an exchange began with.

    Attributes:
        own: [pieces, PIECE], a copy of all of the model's dense part.
        change: [num_weight_pieces, PIECE] of what is sent about the weights.
        factor: of it; None where the number of trainers decides.
        place: of it, where the exchange's own is none for it.
    """

    own: Floats
    change: Floats
    factor: float | None = None
    place: Place | None = None


class DenseRule(ABC):
    """A way to keep a trainer's weights and the master copy together.

    Statistics of norms have a rule of their own, which is the same in all: the master follows the trainers', m <- m +
    (x - m) / trainers, and trainers, who do not use them in training, keep theirs. (A rule that adds changes up could
    make a variance negative.)

    Args:
        weights: of the model.
        config: of the rule.
    """

    def __init__(self, weights: FlatWeights, config: DenseAverageConfig) -> None:
        self.weights, self.config = weights, config
        self._pieces = np.arange(weights.num_pieces, dtype=np.int64)
        self._num = weights.num_weight_pieces

    def begin(self, master: Floats) -> None:
        """Note what the model begins with: the master, [pieces, PIECE]."""
        return

    def note_gradients(self) -> None:
        """Take part between backward and the optimizer's step."""
        return

    @abstractmethod
    def prepare(self) -> Sent:
        """Copy what is to be sent out of the model."""

    @abstractmethod
    def parts(self, sent: Sent, place: Place, trainers: int) -> list[Part]:
        """Return what is sent by an exchange, that of the weights first; called beside training."""

    @abstractmethod
    def take(self, sent: Sent, parts: Sequence[Part], answer: Floats) -> float:
        """Put the answer about the weights into the model, which has been trained on meanwhile.

        Returns:
            ||x - m|| / ||m|| of the weights x that were sent and the master m that they met.
        """

    def _part(self, combine: Combine, place: Place, values: Floats, factor: float, momentum: float = 0.0) -> Part:
        pieces = self._pieces[: self._num]
        return Part(combine=combine, place=place, pieces=pieces, values=values, factor=factor, momentum=momentum)

    def _follow(self, sent: Sent, place: Place, trainers: int) -> list[Part]:
        pieces = self._pieces[self._num :]
        if not pieces.size:
            return []
        values = sent.own[self._num :]
        return [Part(combine=Combine.FOLLOW, place=place, pieces=pieces, values=values, factor=1.0 / trainers)]


class ElasticRule(DenseRule):
    """EASGD: d = alpha (x - m) is added to the master, and subtracted from the weights as they are when it arrives.

    Zhang, Choromanska, LeCun 2015, arXiv:1412.6651, algorithm 1; with its momentum (EAMSGD) where the trainer's
    optimizer has one. Weights that went on by u while d was under way end at x + u - d: u stays theirs, and the force
    is the one that was felt at x. That is how it differs from taking a mean, which would lose u.

    A trainer alone is not pulled back to where it was: the master follows it, so that it trains as without servers.
    """

    def prepare(self) -> Sent:
        """See `DenseRule`."""
        own = self.weights.take()
        return Sent(own, own[: self._num])

    def parts(self, sent: Sent, place: Place, trainers: int) -> list[Part]:
        """See `DenseRule`."""
        if trainers == 1 and self.config.alpha is None:
            weights = self._part(Combine.FOLLOW, place, sent.change, 1.0)
        else:
            weights = self._part(Combine.EASGD, place, sent.change, self.config.alpha_for(trainers))
        return [
            weights,
            *self._follow(sent, place, trainers),
        ]

    def take(self, sent: Sent, parts: Sequence[Part], answer: Floats) -> float:
        """See `DenseRule`."""
        if parts[0].combine == Combine.FOLLOW:
            return relative_distance(sent.change, answer)
        self.weights.add_to_weights(-answer)
        met = sent.change - answer / np.float32(parts[0].factor)
        return relative_distance(sent.change, met)


class BlockRule(DenseRule):
    """Block-wise averaging: the master takes up the trainer's change since it last took the master.

    Chen and Huo 2016 (BMUF): v <- momentum v + change / trainers, m <- m + v. The weights become m, and what they have
    changed by while it was under way stays on top and is part of the next change. One trainer's master is its copy.
    The paper's momentum, 1 - 1 / trainers, is for trainers that all wait for a round's end; without, it diverges early.
    """

    def begin(self, master: Floats) -> None:
        """See `DenseRule`."""
        self._base = master[: self._num].copy()

    def prepare(self) -> Sent:
        """See `DenseRule`."""
        own = self.weights.take()
        return Sent(own, own[: self._num] - self._base)

    def parts(self, sent: Sent, place: Place, trainers: int) -> list[Part]:
        """See `DenseRule`."""
        momentum = self.config.momentum or 0.0
        return [
            self._part(Combine.AVERAGE, place, sent.change, 1.0 / trainers, momentum),
            *self._follow(sent, place, trainers),
        ]

    def take(self, sent: Sent, parts: Sequence[Part], answer: Floats) -> float:
        """See `DenseRule`."""
        self.weights.add_to_weights(answer - sent.own[: self._num])
        self._base = answer
        return relative_distance(sent.own[: self._num], answer)


class GradientRule(DenseRule):
    """Servers update the master with the trainer's gradients, and the weights become the master.

    The trainer's optimizer gets no gradients and holds but the learning rate. Gradients of several steps are sent as
    their mean, under the place of the last one. In the background they are of weights that lack the answer to the
    exchange before, and no more.

    Args:
        weights: of the model.
        config: of the rule.
        optimizer: of the dense part.
        place: of the batch that is trained, in its lane of the data; None is the exchange's own place.

    Raises:
        ValueError: servers have no such optimizer, or it has several learning rates.
    """

    def __init__(
        self,
        weights: FlatWeights,
        config: DenseAverageConfig,
        optimizer: Optimizer,
        place: Callable[[], Place] | None = None,
    ) -> None:
        super().__init__(weights, config)
        name = _KINDS.get(type(optimizer), type(optimizer).__name__.lower())
        if name != config.mode:
            raise unlike(name, config.mode)
        self._optimizer, self._place = optimizer, place
        self._sum: Floats = np.zeros(1, np.float32)
        self._steps = 0
        self._rate = 0.0
        self._last_place: Place | None = None

    def note_gradients(self) -> None:
        """See `DenseRule`; the optimizer's step that follows does nothing."""
        self._rate = self._find_rate()
        gradients = self.weights.take_gradients(self._decays())
        self._sum = self._sum + gradients if self._steps else gradients
        self._steps += 1
        self._last_place = self._place() if self._place is not None else None
        for parameter in self.weights.parameters:
            parameter.grad = None

    def prepare(self) -> Sent:
        """See `DenseRule`."""
        mean = self._sum / np.float32(max(1, self._steps))
        self._steps = 0
        return Sent(self.weights.take(), mean, self._rate, self._last_place)

    def parts(self, sent: Sent, place: Place, trainers: int) -> list[Part]:
        """See `DenseRule`."""
        assert sent.factor is not None
        return [
            self._part(Combine.GRADIENT, sent.place or place, sent.change, sent.factor),
            *self._follow(sent, place, trainers),
        ]

    def take(self, sent: Sent, parts: Sequence[Part], answer: Floats) -> float:
        """See `DenseRule`."""
        self.weights.put_weights(answer)
        return relative_distance(sent.own[: self._num], answer)

    def _find_rate(self) -> float:
        rates = {float(group["lr"]) for group in self._optimizer.param_groups}
        if len(rates) > 1:
            raise ValueError(
                f"--head.learning-rate: expected one learning rate of all weights with --dense-average.mode "
                f"{self.config.mode}, got {min(rates):g} and {max(rates):g}"
            )
        return rates.pop()

    def _decays(self) -> dict[int, float]:
        """Return the weight decay by parameter: to torch's sgd, adagrad and adam it is part of the gradient."""
        groups = self._optimizer.param_groups
        return {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}


def build_rule(
    weights: FlatWeights,
    config: DenseAverageConfig,
    optimizer: Optimizer,
    place: Callable[[], Place] | None,
) -> DenseRule:
    """Make the rule of a configuration; see `GradientRule`."""
    if config.is_on_servers:
        return GradientRule(weights, config, optimizer, place)
    return ElasticRule(weights, config) if config.mode == "easgd" else BlockRule(weights, config)

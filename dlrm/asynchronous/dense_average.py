"""Keeps a trainer's dense part and the servers' master copy together while it trains, and has the master measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import nn
from torch.optim import Optimizer

from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.asynchronous.dense_rules import Sent, build_rule
from dlrm.asynchronous.flat_weights import FlatWeights
from dlrm.training.attachments import Attachment, Moment
from parameter_server.client.dense_client import DenseClient, Part, Place
from parameter_server.dense_codec import Combine, Floats
from parameter_server.errors import ShardUnreachableError


class OwnLane(Protocol):
    """A lane that nobody else has, of those beside the data's."""

    @property
    def lane(self) -> int:
        """Its number."""

    @property
    def lease(self) -> int:
        """Under which it is held."""

    @property
    def next_clock(self) -> int:
        """The first clock that has not been used."""


class _Done(NamedTuple):
    sent: Sent
    parts: list[Part]
    answer: Floats  # about the weights


class DenseAverage(Attachment):
    """Exchanges the dense part with the servers every few steps, in the background.

    The first trainer brings the master copy, others begin with it. What is measured and saved is the master: it is what
    all trainers have found together, and has less noise than any copy, which wanders about it (Zhang et al. 2015: the
    centre variable is what the algorithm gives). So weights are the master's from `before_measuring` on, and the
    trainer's own again from the next step on.

    Args:
        model: tables and dense part; tables have no part in this.
        optimizer: of the dense part.
        client: of all shards; closed with this.
        config: of the rule.
        lane: of this trainer alone.
        count_trainers: asked before each exchange, in the background, how many live trainers there are.
        place: see `GradientRule`.
        ends_chunk: whether the batch that is trained now is the last one of a chunk of the data. Gradients that are
            sent together are of one chunk then, and of the same batches whoever trains it: so each counts once.

    Raises:
        ValueError: the configuration and the optimizer do not go together; later: a shard takes no exchange of this
            model.
        LaneLostError: later: somebody else has the lane.
        ShardUnreachableError: later: an exchange has lasted beyond the client's deadline.
    """

    name = "dense_average"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        client: DenseClient,
        config: DenseAverageConfig,
        *,
        lane: OwnLane,
        count_trainers: Callable[[], int] = lambda: 1,
        place: Callable[[], Place] | None = None,
        ends_chunk: Callable[[], bool] | None = None,
    ) -> None:
        self._ends_chunk = ends_chunk if config.is_on_servers else None
        self.config, self.exchanges = config, 0
        self._weights, self._client = FlatWeights(model), client
        self._rule = build_rule(self._weights, config, optimizer, place)
        self._lane, self._next_clock = lane, lane.next_clock
        self._count_trainers, self._trainers = count_trainers, 1
        self._thread = ThreadPoolExecutor(1, "dense-average")
        self._under_way: Future[_Done] | None = None
        self._began_at = self._answered_at = time.monotonic()
        self._since = 0  # steps that no exchange has begun after
        self._has_begun = False
        self._aside: Floats | None = None  # the trainer's own, while the model has the master's
        self._distance: float | None = None

    @property
    def last_clock(self) -> int:
        """The last one used in the lane, for whoever gets it next."""
        return self._next_clock - 1

    @property
    def under_way(self) -> list[Future[Any]]:
        """The exchange whose answer has not been taken over yet, if there is one."""
        return [] if self._under_way is None else [self._under_way]

    def before_step(self, moment: Moment) -> None:
        """Take over an answer that has come, or the trainer's own weights after a measurement."""
        self._begin()
        if self._aside is not None:
            self._weights.put(self._aside)
            self._aside = None
        self._collect(wait=False)

    def after_backward(self, moment: Moment) -> None:
        """See `DenseRule.note_gradients`."""
        self._rule.note_gradients()

    def after_step(self, moment: Moment, loss: float) -> None:
        """Begin an exchange if it is time; one that is under way then delays it, or is waited for."""
        self._since += 1
        is_last = self._ends_chunk is not None and self._ends_chunk()
        if self._since < self.config.steps and not is_last:
            return
        if self._under_way is not None:
            if not self.config.is_on_servers:
                return
            self._collect(wait=True)  # or gradients would pile up that are all of the same weights
        self._start()
        self._collect(wait=not self.config.background)

    def before_measuring(self) -> None:
        """Exchange what is new, and put the master into the model, as it is by now."""
        if self._aside is None:
            self.exchange_now()
            self._aside = self._weights.take()
        self._weights.put(self._ask(Combine.READ, None))

    def exchange_now(self) -> None:
        """Wait for the exchange under way, and exchange what has been learned since it began, as before leaving.

        Gradients of a chunk wait for those they are sent with: whoever trains it again would send others.
        """
        self._begin()
        self._collect(wait=True)
        if self._since and self._aside is None and self._ends_chunk is None:
            self._start()
            self._collect(wait=True)

    def assign(self) -> None:
        """Make the model's weights the master's, as those of a checkpoint; other trainers meet them as they go."""
        self._collect(wait=True)
        self._aside, self._has_begun, self._since = None, True, 0
        self._rule.begin(self._ask(Combine.ASSIGN, self._weights.take()))

    def values(self) -> dict[str, float]:
        """Return how far the copies are apart, how many exchanges there were, and how long ago the last one was."""
        known = {
            "dense_average/exchanges": float(self.exchanges),
            "dense_average/retries": float(self._client.retries),
            "dense_average/answer_age_seconds": time.monotonic() - self._answered_at,
        }
        return known if self._distance is None else known | {"dense_average/distance": self._distance}

    def close(self) -> None:
        """Give up an exchange under way, and close the client."""
        self._client.close()
        self._thread.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        """Bring the master copy or take it: not before the first step, as a checkpoint may be restored until then."""
        if not self._has_begun:
            self._has_begun = True
            master = self._ask(Combine.SET_IF_ABSENT, self._weights.take())
            self._weights.put(master)
            self._rule.begin(master)

    def _start(self) -> None:
        self._since = 0
        place, self._next_clock = self._place(), self._next_clock + 1
        self._began_at = time.monotonic()
        self._under_way = self._thread.submit(self._exchange, self._rule.prepare(), place)

    def _exchange(self, sent: Sent, place: Place) -> _Done:
        """Exchange; runs beside training."""
        with suppress(ConnectionError):  # as many as before, until the coordinator is back
            self._trainers = max(1, self._count_trainers())
        parts = self._rule.parts(sent, place, self._trainers)
        return _Done(sent, parts, self._client.exchange(parts, sent.own, self._weights.numbers)[0])

    def _collect(self, *, wait: bool) -> None:
        """Take over the answer of the exchange under way, if it has come."""
        if self._under_way is None:
            return
        limit = 2 * self._client.deadline_seconds  # where even the client hangs
        wait_for([self._under_way], limit if wait else 0.0)
        if not self._under_way.done():
            if wait or time.monotonic() - self._began_at > limit:
                raise ShardUnreachableError(f"dense part: expected an exchange to end within {limit:g} s, it did not")
            return
        under_way, self._under_way = self._under_way, None
        done = under_way.result()
        self._distance = self._rule.take(done.sent, done.parts, done.answer)
        self.exchanges += 1
        self._answered_at = time.monotonic()

    def _ask(self, combine: Combine, values: Floats | None) -> Floats:
        """Return the whole master, [pieces, PIECE], after what is said to it."""
        pieces, place = np.arange(self._weights.num_pieces, dtype=np.int64), self._place()
        if combine == Combine.ASSIGN:
            self._next_clock += 1
        part = Part(combine=combine, place=place, pieces=pieces, values=values)
        own = self._weights.take() if values is None else values
        return self._client.exchange([part], own, self._weights.numbers)[0]

    def _place(self) -> Place:
        return Place(self._lane.lane, self._lane.lease, self._next_clock)

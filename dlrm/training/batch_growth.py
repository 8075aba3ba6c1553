"""Lets the batch grow during a run: as was said before it, or when a test finds its gradient too noisy."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dlrm.training.attachments import Attachment, Moment
from dlrm.training.batch_growth_config import BatchGrowthConfig
from dlrm.training.batch_schedules import NoiseScaleSchedule, Stages
from dlrm.training.batch_sizes import BatchSizes
from dlrm.training.batch_tests import Moments, is_known_well, propose_size
from dlrm.training.noise_watch import NoiseWatch

DENSE_GROUPS = ("dense", "head")
FAR = 1 << 62  # beyond all samples

Rescale = Callable[[int, int], None]
"""Given the batch size before and from now on, brings tables to the scale of the new gradients: their states, where the
two differ, and their eps, which no checkpoint holds, also where they do not: at the first step of a process."""


class BatchGrowth(Attachment):
    """What every way of growing has in common: tables are rescaled and rates warmed up again where the batch changes.

    Args:
        sizes: of the run's batches.
        config: of the growth.
        rescale: the tables; None leaves them.
    """

    name = "batch_growth"

    def __init__(self, sizes: BatchSizes, config: BatchGrowthConfig, rescale: Rescale | None = None) -> None:
        self.sizes, self.config = sizes, config
        self._rescale = rescale
        self._size: int | None = None  # of the step before
        self._changed_at: int | None = None  # samples before the last change
        self._rewarming = 1.0
        self._is_first_step = True  # of this process

    def before_step(self, moment: Moment) -> None:
        """See `Attachment`."""
        before, self._size = self._size, moment.batch_size
        has_changed = before is not None and before != moment.batch_size
        if has_changed:
            self._changed_at = moment.samples
        if self._rescale is not None and (has_changed or self._is_first_step):
            self._rescale(before or moment.batch_size, moment.batch_size)
        self._is_first_step = False
        length = self.config.rewarm_samples
        middle = moment.samples + moment.global_size / 2
        is_warming = self._changed_at is not None and middle < self._changed_at + length
        self._rewarming = (middle - (self._changed_at or 0)) / length if is_warming else 1.0

    def factor(self, group: str) -> float:
        """See `Attachment`."""
        return self._rewarming if group in DENSE_GROUPS else 1.0

    def state(self) -> dict[str, Any]:
        """See `Attachment`."""
        return {"size": self._size, "changed_at": self._changed_at}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Attachment`."""
        self._size, self._changed_at = state["size"], state["changed_at"]


class StagedGrowth(BatchGrowth):
    """Takes sizes that are known before the run begins.

    Args:
        sizes: of the run's batches.
        config: of the growth.
        stages: (from sample, size).
        rescale: see `BatchGrowth`.
    """

    def __init__(
        self, sizes: BatchSizes, config: BatchGrowthConfig, stages: Stages, rescale: Rescale | None = None
    ) -> None:
        super().__init__(sizes, config, rescale)
        for samples, size in stages:
            sizes.change(size, from_samples=samples)


class GrowthInsteadOfDecay(StagedGrowth):
    """Follows a `NoiseScaleSchedule`: the dense part's rate stays up where the batch has grown instead.

    Args:
        sizes: of the run's batches.
        config: of the growth.
        schedule: that is followed.
        rescale: see `BatchGrowth`.
    """

    def __init__(
        self,
        sizes: BatchSizes,
        config: BatchGrowthConfig,
        schedule: NoiseScaleSchedule,
        rescale: Rescale | None = None,
    ) -> None:
        super().__init__(sizes, config, schedule.stages, rescale)
        self.schedule = schedule

    def factor(self, group: str) -> float:
        """Return the ratio of batch sizes, which undoes what the schedule has taken from the rate."""
        ratio = (self._size or self.schedule.first) / self.schedule.first
        return super().factor(group) * (ratio if group in DENSE_GROUPS else 1.0)


class TestedGrowth(BatchGrowth):
    """Lets the batch grow when its gradient fails a test; all ranks decide on the same sums, and so alike.

    Args:
        sizes: of the run's batches.
        config: of the growth.
        watch: that measures gradients, called before this.
        largest: batch size.
        round_to: batch sizes are multiples of it.
        rescale: see `BatchGrowth`.
    """

    __test__ = False  # its name is no test's

    def __init__(
        self,
        sizes: BatchSizes,
        config: BatchGrowthConfig,
        watch: NoiseWatch,
        *,
        largest: int,
        round_to: int,
        rescale: Rescale | None = None,
    ) -> None:
        super().__init__(sizes, config, rescale)
        self.moments = Moments()
        self._watch, self._largest, self._round_to = watch, largest, round_to
        self._has_complained = False

    def before_step(self, moment: Moment) -> None:
        """See `Attachment`."""
        super().before_step(moment)
        if self._changed_at == moment.samples:
            self.moments.note_change()

    def after_step(self, moment: Moment, loss: float) -> None:
        """See `Attachment`."""
        if self._watch.latest is None:
            return
        self.moments.add(self._watch.latest, self._watch.config.decay)
        proposed = propose_size(self.moments, self.config)
        if self._is_stalled and not self._has_complained:
            self._has_complained = True
            print(
                f"recforge: --growth.test {self.config.test}: after {self.moments.measurements} measurements the "
                "gradient cannot be told from noise, which no batch size would pass: the batch stays until it can",
                file=sys.stderr,
            )
        if proposed is None or not is_known_well(self.moments, self.config):
            return
        samples = moment.samples + moment.global_size
        now = self.sizes.at(FAR)
        # Not while a change is still to come: batches that are cut already may be of two sizes then.
        if self.sizes.at(samples) == now and (size := self._allowed(proposed, now)) > now:
            self.sizes.change_after(size, samples)

    def values(self) -> dict[str, float]:
        """Return the batch size that the test asks for, or that no size would pass."""
        if self._is_stalled:
            return {"growth/stalled": 1.0}
        proposed = propose_size(self.moments, self.config)
        return {} if proposed is None else {"growth/wanted_batch_size": proposed}

    def state(self) -> dict[str, Any]:
        """See `Attachment`."""
        return {**super().state(), "moments": self.moments.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Attachment`."""
        super().load_state(state)
        self.moments.load_state(state["moments"])

    @property
    def _is_stalled(self) -> bool:
        norm = self.moments.squared_norm.mean
        return norm is not None and norm <= 0.0 and is_known_well(self.moments, self.config)

    def _allowed(self, proposed: float, now: int) -> int:
        """Return the size to take: a multiple, not far from the present one, and not too large."""
        wished = min(proposed, now * self.config.step_ratio, float(self._largest))
        up = math.ceil(wished / self._round_to) * self._round_to
        return up if up <= self._largest else self._largest // self._round_to * self._round_to

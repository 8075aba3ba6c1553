"""Follows the gradient noise scale of every part of the model while it trains, at a small share of the step's time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from dlrm.noise.config import NoiseScaleConfig
from dlrm.noise.gradient_meter import BAND, TABLE, TABLES, GradientMeter, Measured
from dlrm.noise.noise_scale import GradientNoiseScale
from dlrm.noise.preconditioner import Preconditioner
from dlrm.training.attachments import Attachment, Moment

PREFIX = "noise_scale/"
LEFT_OUT = f"{PREFIX}left_out/"


class NoiseWatch(Attachment):
    """Measures some steps and smooths what they tell.

    Args:
        meter: of the model's gradients.
        config: when, and how.
        products: also measure how the samples' gradients lie to their mean, for who asks `latest` for it.
        preconditioner: of the dense optimizer, if asked for.
        tells_dense: whether the dense part's noise is told; below a batch norm it is not known.

    Attributes:
        scales: what is known of each group so far.
        latest: what the last measured step has told, None unless that was the last step.
    """

    name = "noise_scale"

    def __init__(
        self,
        meter: GradientMeter,
        config: NoiseScaleConfig,
        *,
        products: bool = False,
        preconditioner: Preconditioner | None = None,
        tells_dense: bool = True,
    ) -> None:
        self.meter, self.config = meter, config
        self.scales: dict[str, GradientNoiseScale] = {}
        self.latest: Measured | None = None
        self._products, self._preconditioner, self._tells_dense = products, preconditioner, tells_dense
        self._steps, self._is_open, self._has_complained = 0, False, False

    def before_step(self, moment: Moment) -> None:
        """See `Attachment`."""
        is_due = self._steps % self.config.every_steps == 0
        self._is_open = is_due and (self._preconditioner is None or self._preconditioner.is_ready)
        self.latest = None
        if self._is_open:
            self.meter.open()

    def after_backward(self, moment: Moment) -> None:
        """See `Attachment`."""
        self._steps += 1
        if not self._is_open:
            return
        self.latest = self.meter.finish(
            len(moment.batch), moment.global_size, products=self._products, precondition=self._preconditioner
        )
        if self.meter.failure is not None and not self._has_complained:
            self._has_complained = True
            print(f"recforge: the gradients' noise was not measured: {self.meter.failure}", file=sys.stderr)
        for name, sums in self.latest.groups.items():
            self.scales.setdefault(name, GradientNoiseScale(self.config.decay)).add(sums.estimate())

    def values(self) -> dict[str, float]:
        """Return the noise scale of each group in samples, where it is known, and how much was left out of it."""
        of_tables = (TABLES, TABLE, BAND)
        told = {n: scale for n, scale in self.scales.items() if self._tells_dense or n.startswith(of_tables)}
        known = {PREFIX + name: scale.value for name, scale in told.items()}
        return {
            **{name: value for name, value in known.items() if value is not None},
            **{LEFT_OUT + name: float(count) for name, count in self.meter.left_out.items()},
        }

    def state(self) -> dict[str, Any]:
        """See `Attachment`."""
        return {"steps": self._steps, "scales": {name: scale.state() for name, scale in self.scales.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Attachment`."""
        self._steps = int(state["steps"])
        self.scales = {}
        for name, scale in state["scales"].items():
            self.scales[name] = GradientNoiseScale(self.config.decay)
            self.scales[name].load_state(scale)

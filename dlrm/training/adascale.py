"""AdaScale: the learning rate follows how much a large batch's step counts for, as measured while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlrm.noise.gradient_meter import DENSE
from dlrm.optim.scaling_rules import adascale_gain
from dlrm.training.attachments import Attachment, Moment
from dlrm.training.noise_watch import NoiseWatch


class AdaScale(Attachment):
    """Multiplies the dense part's rates by the gain, and lets schedules advance by it.

    Johnson et al. 2020, arXiv:2007.05105: a step of gain g does what g steps of the base batch would, so that schedules
    come forward by g base batches, fewer samples than the step takes. Tables keep their rate.

    The gain is how many times smaller the large batch's squared gradient is expected to be. An optimizer that divides
    by the gradient's size (its root mean square, as Adam's, or its norm, as LARS's) so takes a step that is longer
    by the root of the gain for the same true gradient, and its rate needs the other root only. (Vectors, by whose norm
    lars does not divide, get the same rate.)

    Args:
        watch: of the gradients, called before this.
        base: batch size that rates and schedules were chosen for.
        is_adaptive: whether the dense optimizer divides by the gradient's size: its rate follows the root of the gain.

    Attributes:
        gain: of the step to come; 1 until gradients were measured.
        progress: samples of base batches that all steps so far were worth.
    """

    name = "adascale"

    def __init__(self, watch: NoiseWatch, base: int, *, is_adaptive: bool) -> None:
        self.watch, self.base, self.is_adaptive = watch, base, is_adaptive
        self.gain, self.progress = 1.0, 0.0
        self._worth = 0.0  # of the step to come, in samples of base batches
        self._rate = 1.0

    def before_step(self, moment: Moment) -> None:
        """See `Attachment`."""
        ratio, scale = moment.batch_size / self.base, self.watch.scales.get(DENSE)
        squared_norm, variance = (None, None) if scale is None else (scale.squared_norm, scale.variance)
        if squared_norm is not None and variance is not None:
            of_batch = variance / self.base
            self.gain = adascale_gain(of_batch, squared_norm, ratio)
            self._rate = adascale_gain(of_batch, squared_norm, ratio, adaptive=self.is_adaptive)
        # An epoch's last batch may be cut short, and is worth as much less.
        self._worth = self.gain * self.base * moment.global_size / moment.batch_size

    def after_step(self, moment: Moment, loss: float) -> None:
        """See `Attachment`."""
        self.progress += self._worth

    def position(self, samples: float) -> float:
        """See `Attachment`."""
        return self.progress + self._worth / 2

    def factor(self, group: str) -> float:
        """See `Attachment`."""
        return 1.0 if group.endswith("tables") else self._rate

    def values(self) -> dict[str, float]:
        """See `Attachment`."""
        return {"adascale_gain": self.gain, "adascale_progress": self.progress}

    def state(self) -> dict[str, Any]:
        """See `Attachment`."""
        return {"progress": self.progress}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Attachment`."""
        self.progress = float(state["progress"])

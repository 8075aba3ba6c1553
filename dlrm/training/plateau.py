"""Steers learning rates by the valid split: lowers them, or goes on to another formula, when it gets no better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from dlrm.metrics.metrics import LOWER_IS_BETTER
from dlrm.optim.plateau import PlateauConfig, PlateauDetector
from dlrm.training.attachments import Attachment, Moment
from dlrm.training.problem import Values


class FollowPlateau(Attachment, ABC):
    """What both ways have in common: a plateau of the metric, which all ranks measure alike, changes a factor.

    Args:
        config: of the plateau.
        metric: that is watched.
    """

    name = "plateau"

    def __init__(self, config: PlateauConfig, metric: str) -> None:
        self.config, self.metric = config, metric
        self._detector = PlateauDetector(
            patience=config.patience,
            cooldown=config.cooldown,
            least_gain=config.least_gain,
            higher_is_better=metric not in LOWER_IS_BETTER,
        )

    def after_evaluation(self, values: Values, samples: int) -> None:
        """See `Attachment`."""
        if self._detector.note(float(getattr(values, self.metric))):
            self.change(samples)

    def factor(self, group: str) -> float:
        """See `Attachment`."""
        kind = "tables" if group.endswith("tables") else "dense"
        return self.current() if self.config.groups in ("all", kind) else 1.0

    @abstractmethod
    def change(self, samples: int) -> None:
        """Take another factor, as there is a plateau after so many samples."""

    @abstractmethod
    def current(self) -> float:
        """Return the factor of the next step."""

    def values(self) -> dict[str, float]:
        """See `Attachment`."""
        return {"plateau_factor": self.current()}

    def state(self) -> dict[str, Any]:
        """See `Attachment`."""
        return {"settings": self._settings(), "detector": self._detector.state()} | self.factor_state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Attachment`; begin anew if it is of another configuration, as that of a run that was branched off from.

        What was measured, decided and chosen there says nothing about other shapes, factors or metrics.
        """
        former = {name: _as_tuple(value) for name, value in state.get("settings", {}).items()}
        if any(former.get(name, value) != value for name, value in self._settings().items()):
            return
        self._detector.load_state(state["detector"])
        self.load_factor(state)

    @abstractmethod
    def factor_state(self) -> dict[str, Any]:
        """Return what `load_factor` needs."""

    @abstractmethod
    def load_factor(self, state: Mapping[str, Any]) -> None:
        """Go on with a factor."""

    def _settings(self) -> dict[str, Any]:
        return {**vars(self.config), "metric": self.metric}


class ReduceOnPlateau(FollowPlateau):
    """Multiplies the rate by a factor at each plateau, down to a floor."""

    def __init__(self, config: PlateauConfig, metric: str) -> None:
        super().__init__(config, metric)
        self._factor = 1.0

    def change(self, samples: int) -> None:
        """See `FollowPlateau`."""
        self._factor = max(self.config.floor, self._factor * self.config.factor)

    def current(self) -> float:
        """See `FollowPlateau`."""
        return self._factor

    def factor_state(self) -> dict[str, Any]:
        """See `FollowPlateau`."""
        return {"factor": self._factor}

    def load_factor(self, state: Mapping[str, Any]) -> None:
        """See `FollowPlateau`."""
        self._factor = float(state["factor"])


class ChangeOnPlateau(FollowPlateau):
    """Goes on to a bolder formula at a plateau early in the run, and to a calmer one late in it.

    Args:
        config: of the plateau.
        metric: that is watched.
        total_samples: of the run.
    """

    def __init__(self, config: PlateauConfig, metric: str, total_samples: int) -> None:
        super().__init__(config, metric)
        self._formulas, self._index = config.formulas(), config.start
        self._bold_until = config.bold_until * total_samples
        self._samples = 0.0  # at the middle of the step

    def before_step(self, moment: Moment) -> None:
        """See `Attachment`."""
        self._samples = moment.samples + moment.global_size / 2

    def change(self, samples: int) -> None:
        """See `FollowPlateau`."""
        wished = self._index + (1 if samples < self._bold_until else -1)
        self._index = min(max(wished, 0), len(self._formulas) - 1)

    def current(self) -> float:
        """See `FollowPlateau`."""
        return self._formulas[self._index].factor(self._samples)

    def values(self) -> dict[str, float]:
        """See `Attachment`."""
        return super().values() | {"plateau_shape": float(self._index)}

    def factor_state(self) -> dict[str, Any]:
        """See `FollowPlateau`."""
        return {"index": self._index}

    def load_factor(self, state: Mapping[str, Any]) -> None:
        """See `FollowPlateau`."""
        self._index = int(state["index"])


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def follow_plateau(config: PlateauConfig, metric: str, total_samples: int) -> FollowPlateau:
    """Make what a configuration asks for, which must not be off."""
    if config.policy == "reduce":
        return ReduceOnPlateau(config, metric)
    return ChangeOnPlateau(config, metric, total_samples)

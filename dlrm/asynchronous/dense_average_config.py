"""What a user says about how trainers share the dense part; free of torch so that the command line stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from dlrm.optim.config import DenseOptimizerConfig
from parameter_server.description import DenseMode

ON_SERVERS = ("sgd", "adagrad", "adam")


def unlike(name: str, mode: str) -> ValueError:
    """Make the error for an optimizer that servers do not have."""
    return ValueError(
        f"--dense.name {name}: expected {mode} as --dense-average.mode, or the mode easgd or average: servers update "
        "number by number, with sgd, adagrad or adam; lamb and others run on the trainers"
    )


@dataclass(frozen=True, kw_only=True)
class DenseAverageConfig:
    """How trainers' copies of the dense part are kept together with the servers' master copy.

    Raises:
        ValueError: Naming the flag, for a number out of range or one that the mode has no use for.
    """

    mode: DenseMode = "easgd"
    """easgd: copies and master pull each other; average: the master takes up copies' changes, and they take it; sgd,
    adagrad, adam: servers update the master with trainers' gradients."""
    every_steps: int | None = None
    """Exchange after so many steps; None: 8, or 1 where servers update."""
    alpha: float | None = None
    """`easgd`: share of the distance to the master by which both move; None: beta / trainers, and at most 0.5; the
    master follows a trainer that is alone."""
    beta: float = 0.9
    """`easgd`: alpha times the number of trainers."""
    momentum: float | None = None
    """`average`: of the master; None: 0. It makes all steps longer, by 1 / (1 - momentum)."""
    background: bool = True
    """Train on while an exchange is under way."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(DenseMode):
            raise ValueError(
                f"--dense-average.mode: expected one of {', '.join(get_args(DenseMode))}, got {self.mode!r}: servers "
                "update number by number; lamb and others run on the trainers, with easgd or average"
            )
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"--dense-average.every-steps: expected at least 1, got {self.every_steps}")
        for name, mode in (("alpha", "easgd"), ("momentum", "average")):
            if getattr(self, name) is not None and self.mode != mode:
                raise ValueError(f"--dense-average.{name}: expected --dense-average.mode {mode}, got {self.mode}")
        if self.alpha is not None and not 0.0 < self.alpha < 1.0:
            raise ValueError(
                f"--dense-average.alpha: expected a number in (0, 1), above which copies move apart, got {self.alpha}"
            )
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"--dense-average.beta: expected a number in (0, 1), got {self.beta}")
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"--dense-average.momentum: expected a number in [0, 1), got {self.momentum}")

    @property
    def is_on_servers(self) -> bool:
        """Whether servers update, with gradients."""
        return self.mode in ON_SERVERS

    @property
    def steps(self) -> int:
        """After how many steps there is an exchange."""
        return self.every_steps or (1 if self.is_on_servers else 8)

    def server_options(self, dense: DenseOptimizerConfig) -> dict[str, Any]:
        """Return the options of the servers' optimizer, for the description of a run; none where trainers update.

        Raises:
            ValueError: servers cannot do what the trainers' optimizer would.
        """
        if not self.is_on_servers:
            return {}
        if dense.name != self.mode:
            raise unlike(dense.name, self.mode)
        given = {name: getattr(dense, name) for name in ("betas", "eps", "momentum")}
        return {name: value for name, value in given.items() if value is not None}

    def alpha_for(self, trainers: int) -> float:
        """Return the elastic force's share, for so many live trainers."""
        return min(0.5, self.beta / trainers) if self.alpha is None else self.alpha

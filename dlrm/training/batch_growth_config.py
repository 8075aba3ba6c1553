"""What a user says about batches that grow during a run; free of torch so that the command line stays quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

GrowthTest = Literal["none", "norm", "inner_product", "augmented"]


TESTS = ("--growth.test norm", "--growth.test inner_product", "--growth.test augmented")
USED_BY = {
    "max_batch_size": ("--growth.instead-of-decay", *TESTS),
    "round_to": ("--growth.instead-of-decay", *TESTS),
    "step_ratio": ("--growth.instead-of-decay", *TESTS),
    "first_measurements": TESTS,
    "norm_tolerance": TESTS[:1],
    "inner_product_tolerance": TESTS[1:],
    "orthogonality_tolerance": TESTS[2:],
    "rewarm_samples": (),  # by all
    "rescale_states": (),
}


@dataclass(frozen=True, kw_only=True)
class BatchGrowthConfig:
    """How many samples a step takes, where that is not the same throughout; batches never get smaller.

    Raises:
        ValueError: Naming the flag, for a number out of range, or more than one way of growing.
    """

    stages: tuple[str, ...] = ()
    """Stages as FROM=SIZE ...: after so many samples, so many samples per step."""
    rewarm_samples: int = 0
    """Warm the dense part's learning rate up again, from 0, over so many samples after each change."""
    instead_of_decay: bool = False
    """Let the batch grow where the dense part's schedule would lower its learning rate, up to the largest batch."""
    test: GrowthTest = "none"
    """Let the batch grow when its gradient fails this test of how noisy it is; see `--noise-scale.every-steps`."""
    max_batch_size: int | None = None
    """The largest batch; None means a tenth of the training samples."""
    norm_tolerance: float = 0.5
    """Test `norm`: root of the gradient's variance over its squared norm that is tolerated."""
    inner_product_tolerance: float = 0.5
    """Tests `inner_product` and `augmented`: the same of the samples' gradients along the batch's."""
    orthogonality_tolerance: float = 1.0
    """Test `augmented`: the same of the samples' gradients across the batch's."""
    first_measurements: int = 5
    """Measure so many steps before a test may change the batch; but for `norm`, again after each change."""
    step_ratio: float = 2.0
    """At most so many times larger at once where a test decides; and the steps that replace a decay."""
    round_to: int | None = None
    """Batches are multiples of this; None means the number of ranks, times the ghost batch of a GhostBatchNorm."""
    rescale_states: bool = True
    """When the batch changes, bring the squared gradients that the tables' optimizers hold, and their eps, to the new
    scale."""

    def __post_init__(self) -> None:
        ways = {"stages": bool(self.stages), "instead-of-decay": self.instead_of_decay, "test": self.test != "none"}
        chosen = [f"--growth.{name}" for name, is_chosen in ways.items() if is_chosen]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]}: expected one way of growing, got {' and '.join(chosen)}")
        for name in ("norm_tolerance", "inner_product_tolerance", "orthogonality_tolerance"):
            self._check(name, 0.0 < getattr(self, name) < math.inf, "a number > 0")
        self._check("step_ratio", 1.0 < self.step_ratio < math.inf, "a number > 1")
        self._check("rewarm_samples", self.rewarm_samples >= 0, "a number of samples >= 0")
        self._check("first_measurements", self.first_measurements >= 1, "at least 1")
        for name in ("max_batch_size", "round_to"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        parse_stages(self.stages)

    @property
    def is_on(self) -> bool:
        """Whether batches may grow at all."""
        return bool(self.stages) or self.instead_of_decay or self.test != "none"

    def check_used(self, *, is_staged: bool) -> None:
        """Check that nothing was said which has no part in how batches grow.

        Args:
            is_staged: whether a schedule's stages say batch sizes.

        Raises:
            ValueError: naming the flag, and what would make use of it.
        """
        ways = [f"--growth.test {self.test}"] * (self.test != "none")
        ways += ["--growth.instead-of-decay"] * self.instead_of_decay
        for option in fields(self):
            if option.name not in USED_BY or getattr(self, option.name) == option.default:
                continue
            used_by = USED_BY[option.name]
            if not (self.is_on or is_staged) or (used_by and not set(used_by) & set(ways)):
                flag, told = f"--growth.{option.name.replace('_', '-')}", getattr(self, option.name)
                expected = " or ".join(used_by) or "a way of growing, as --growth.stages,"
                raise ValueError(f"{flag}: expected {expected} beside it, without which {told} does nothing")

    def _check(self, option: str, holds: bool, expected: str) -> None:
        if not holds:
            flag = f"--growth.{option.replace('_', '-')}"
            raise ValueError(f"{flag}: expected {expected}, got {getattr(self, option)}")


def parse_stages(texts: tuple[str, ...]) -> list[tuple[int, int]]:
    """Return (from sample, size) of stages written as FROM=SIZE, where either may have underscores.

    Raises:
        ValueError: one is written otherwise, or samples or sizes do not ascend.
    """
    stages: list[tuple[int, int]] = []
    for text in texts:
        first, _, size = text.partition("=")
        try:
            stages.append((int(first), int(size)))
        except ValueError:
            raise ValueError(f"--growth.stages: expected FROM=SIZE, as 1000000=8192, got {text!r}") from None
    for before, after in zip([(0, 0), *stages], stages, strict=False):
        if not (after[0] > before[0] and after[1] > before[1]):
            raise ValueError(
                f"--growth.stages: expected samples above 0 and sizes that ascend, got {before[0]}={before[1]} before "
                f"{after[0]}={after[1]}"
            )
    return stages

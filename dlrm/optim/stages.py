"""A run in stages: each has a batch size, a learning rate and a warm-up of its own."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

from dlrm.optim.decays import LinearWarmup
from dlrm.optim.formulas import Formula, is_list, text_of

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Stage:
    """A stretch of a run.

    Attributes:
        samples: its length.
        batch_size: samples per step.
        warmup: length of the linear warm-up from 0 with which it begins.
        rate: factor on the learning rate after that.

    Raises:
        ValueError: a number is out of range.
    """

    samples: float
    batch_size: int
    warmup: float = 0.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        whole = isinstance(self.batch_size, int) and self.batch_size > 0
        fits = whole and 0 <= self.warmup <= self.samples < math.inf and self.samples > 0 and 0 <= self.rate < math.inf
        if not fits:
            expected = "samples > 0, a whole batch size > 0, a warm-up of 0 to samples, a rate >= 0"
            raise ValueError(f"stages(stages): expected {expected}, got {self}")

    def __str__(self) -> str:
        return text_of((self.samples, self.batch_size, self.warmup, self.rate))


@dataclass(frozen=True)
class StageSchedule(Formula):
    """Stages one after the other; the last one goes on.

    Each begins with a warm-up, because another batch size, or another kind of data, is another loss surface (You et al.
    2020, arXiv:1904.00962, mixed-batch training).

    Attributes:
        stages: in their order; a tuple stands for (samples, batch size, warm-up, rate).
    """

    name: ClassVar[str] = "stages"

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        self._check("stages", is_list(self.stages, _is_stage), "(SAMPLES, BATCH, WARMUP, RATE), ...")
        object.__setattr__(self, "stages", tuple(s if isinstance(s, Stage) else Stage(*s) for s in self.stages))

    @property
    def warmup_samples(self) -> float:
        """See `Formula`."""
        return self.stages[0].warmup

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        starts = self._starts()
        index = bisect_right(starts, samples) - 1
        stage = self.stages[index]
        return stage.rate * LinearWarmup(stage.warmup).factor(samples - starts[index])

    def stretch(self, lengths: float, warmups: float = 1.0) -> Self:
        """See `Formula`; a warm-up stays within its stage."""
        return replace(
            self,
            stages=tuple(
                replace(s, samples=s.samples * lengths, warmup=min(s.samples, s.warmup * warmups) * lengths)
                for s in self.stages
            ),
        )

    @property
    def batch_sizes(self) -> tuple[tuple[int, int], ...]:
        """(from sample, samples per step) of every stage."""
        return tuple((round(start), stage.batch_size) for start, stage in zip(self._starts(), self.stages, strict=True))

    def _starts(self) -> list[float]:
        return [0.0, *accumulate(stage.samples for stage in self.stages[:-1])]

    def _arguments(self) -> Iterator[str]:
        return map(str, self.stages)


def _is_stage(given: object) -> bool:
    if isinstance(given, Stage):
        return True
    return isinstance(given, tuple | list) and 2 <= len(given) <= 4 and all(isinstance(n, int | float) for n in given)

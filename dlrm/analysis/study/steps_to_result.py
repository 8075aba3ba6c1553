"""The fewest steps to a goal for each batch size, with every hyperparameter tuned anew; of trainers of any kind.

Protocol of "Measuring the Effects of Data Parallelism on Neural Network Training" (Shallue et al. 2019), section 4:
the same budget of trials for each batch size, a search that ends at an edge of its space is not believed, and trials
that diverge are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from dlrm.analysis.study.search import propose, spread_first
from dlrm.analysis.study.space import Space, extend, find_edges
from dlrm.analysis.study.study_folder import Record, StudyFolder
from dlrm.diverged import DivergedError

# What a trial costs that has not come to the goal, on top of how much it lacks; and one that diverged.
UNREACHED, DIVERGED = 1e3, 1e6

Evaluations = Iterable[tuple[float, float]]
"""(samples seen, metric) again and again, as a run goes on; who takes them may stop at any time."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run that is wanted.

    Attributes:
        name: of the trial.
        batch_size: samples per step.
        parameters: hyperparameters by name.
        seed: of the run.
        most_samples: after which it is of no use any more.
    """

    name: str
    batch_size: int
    parameters: Mapping[str, float]
    seed: int
    most_samples: float


MakeTrainer = Callable[[Request], Evaluations]
"""Starts a run; raises `DivergedError`, or gives a metric that is not finite, where it comes to nothing."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How each batch size is tuned.

    Attributes:
        goal: of the metric.
        higher_is_better: as of AUC.
        trials: of each batch size.
        repeats: of its best trial, with other seeds; what is reported is theirs, as the best of many trials is best by
            luck too.
        most_samples: of a trial.
        abort_factor: a trial stops after so many times the samples of the best one of its batch size.
        least_reached: share of trials that must come to the goal for a batch size to be believed.
        seed: of the search; trials train with it, repeats with the next ones.
        first: hyperparameters of each batch size's first trial, if any.
    """

    goal: float
    higher_is_better: bool = True
    trials: int = 12
    repeats: int = 3
    most_samples: float = math.inf
    abort_factor: float = 2.0
    least_reached: float = 0.1
    seed: int = 0
    first: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """What was found for one batch size.

    Attributes:
        batch_size: samples per step.
        samples: to the goal: mean over repeats, or of the best trial if there are none; None if none came to it.
        spread: standard deviation over repeats; None below two.
        parameters: the best ones.
        edges: hyperparameters of these that lie at an end of their range.
        extended: whether the ranges were extended, and searched again.
        trials: of the search.
        reached: of these, how many came to the goal.
        diverged: of these, how many diverged.
        repeated: samples to the goal of each repeat, None where it did not come to it.
        rejected: why the batch size has no part in the fit; "" if it has.
    """

    batch_size: int
    samples: float | None
    spread: float | None
    parameters: dict[str, float]
    edges: dict[str, str]
    extended: bool
    trials: int
    reached: int
    diverged: int
    repeated: tuple[float | None, ...]
    rejected: str

    @property
    def steps(self) -> float | None:
        """Steps to the goal."""
        return None if self.samples is None else self.samples / self.batch_size


def steps_to_result(
    make_trainer: MakeTrainer,
    batches: Sequence[int],
    space: Space,
    protocol: Protocol,
    study: StudyFolder | None = None,
) -> list[BatchResult]:
    """Find the fewest steps to a goal for each batch size.

    Of each, the first trials are the given one, the best one of the batch size before, and some that are spread over
    the space; a search goes on from these. A best trial at the edge of the space has its range extended once and half
    as many trials again; if it then still lies at an edge, the batch size is rejected.

    Args:
        make_trainer: starts a run.
        batches: sizes to try.
        space: of the hyperparameters.
        protocol: goal and budgets.
        study: writes each trial down, and knows those of before; None keeps nothing.
    """
    results: list[BatchResult] = []
    for batch in batches:
        hints = [protocol.first] if protocol.first is not None else []
        if results and results[-1].parameters:
            hints.append(results[-1].parameters)
        results.append(_Tuning(make_trainer, batch, protocol, study).tune(space, hints))
    return results


def find_crossing(course: Sequence[tuple[float, float]], goal: float, *, higher_is_better: bool) -> float | None:
    """Return after how many samples a metric has come to its goal; None if it has not.

    Between the evaluation before and the one that shows it, the metric is taken to go in a straight line. A goal that
    the first evaluation shows already was passed at an unknown moment before; its samples are returned.
    """
    before: tuple[float, float] | None = None
    for samples, value in course:
        if (value >= goal) if higher_is_better else (value <= goal):
            if before is None:
                return samples
            return before[0] + (samples - before[0]) * (goal - before[1]) / (value - before[1])
        before = samples, value
    return None


class _Tuning:
    """The trials of one batch size."""

    def __init__(
        self, make_trainer: MakeTrainer, batch_size: int, protocol: Protocol, study: StudyFolder | None
    ) -> None:
        self.make_trainer, self.batch_size, self.protocol, self.study = make_trainer, batch_size, protocol, study
        self.tried: list[Record] = []

    def tune(self, space: Space, hints: Sequence[Mapping[str, float]]) -> BatchResult:
        protocol = self.protocol
        spread = spread_first(space, _mix(protocol.seed, self.batch_size))
        self._search(space, protocol.trials, [*_fit_hints(space, hints), *spread])
        best = self._best()
        edges = {} if best is None else find_edges(space, best["parameters"])
        extended = bool(edges)
        if extended:
            more = math.ceil(protocol.trials / 2)
            if self.study is not None:
                self.study.expect(more)
                self.study.say(f"batch {self.batch_size:,}: the best lies at an edge ({_name(edges)}); range extended")
            space = extend(space, edges)
            self._search(space, more)
            best = self._best()
            edges = {} if best is None else find_edges(space, best["parameters"])
        repeated = () if best is None else self._repeat(best)
        return self._sum_up(best, edges, extended, repeated)

    def _search(self, space: Space, trials: int, given: Sequence[Mapping[str, float]] = ()) -> None:
        protocol = self.protocol
        for number in range(len(self.tried), len(self.tried) + trials):
            if number < len(given):
                parameters = dict(given[number])
            else:
                tried = [(record["parameters"], self._cost(record)) for record in self.tried]
                parameters = propose(space, tried, _mix(protocol.seed, self.batch_size, number))
            self.tried.append(self._run(f"{self.batch_size}/{number}", parameters, protocol.seed))

    def _repeat(self, best: Record) -> tuple[float | None, ...]:
        records = [
            self._run(f"{self.batch_size}/repeat-{number}", best["parameters"], self.protocol.seed + 1 + number)
            for number in range(self.protocol.repeats)
        ]
        return tuple(record["samples"] for record in records)

    def _run(self, name: str, parameters: Mapping[str, float], seed: int) -> Record:
        best = self._best()
        most = self.protocol.most_samples
        if best is not None:
            most = min(most, self.protocol.abort_factor * best["samples"])
        request = Request(
            name=name, batch_size=self.batch_size, parameters=parameters, seed=seed, most_samples=float(most)
        )
        if self.study is None:
            return self._attempt(request)
        return self.study.trial(name, lambda: self._attempt(request))

    def _attempt(self, request: Request) -> dict[str, Any]:
        protocol, course, diverged = self.protocol, list[tuple[float, float]](), ""
        try:
            for samples, value in self.make_trainer(request):
                if not math.isfinite(value):
                    raise DivergedError(f"the metric is {value} after {samples:,.0f} samples")
                course.append((float(samples), float(value)))
                came = value >= protocol.goal if protocol.higher_is_better else value <= protocol.goal
                if came or samples >= request.most_samples:
                    break
        except DivergedError as error:
            diverged = str(error)
        values = [value for _, value in course]
        return {
            "batch_size": self.batch_size,
            "parameters": dict(request.parameters),
            "seed": request.seed,
            "samples": find_crossing(course, protocol.goal, higher_is_better=protocol.higher_is_better),
            "best": (max if protocol.higher_is_better else min)(values) if values else None,
            "diverged": diverged,
            "course": course,
        }

    def _best(self) -> Record | None:
        reached = [record for record in self.tried if record["samples"] is not None]
        return min(reached, key=lambda record: float(record["samples"]), default=None)

    def _cost(self, record: Record) -> float:
        if record["samples"] is not None:
            return math.log(record["samples"])
        if record["diverged"] or record["best"] is None:
            return DIVERGED
        return UNREACHED + abs(self.protocol.goal - float(record["best"]))

    def _sum_up(
        self, best: Record | None, edges: dict[str, str], extended: bool, repeated: tuple[float | None, ...]
    ) -> BatchResult:
        came = [samples for samples in repeated if samples is not None]
        reached = sum(record["samples"] is not None for record in self.tried)
        if best is None:
            rejected = "no trial came to the goal"
        elif reached < self.protocol.least_reached * len(self.tried):
            rejected = f"only {reached} of {len(self.tried)} trials came to the goal"
        elif edges:
            rejected = f"the best lies at the edge of the range of {_name(edges)}"
        elif len(came) < len(repeated) / 2:
            rejected = f"only {len(came)} of {len(repeated)} repeats came to the goal"
        else:
            rejected = ""
        return BatchResult(
            batch_size=self.batch_size,
            samples=fmean(came) if came else None if best is None else best["samples"],
            spread=stdev(came) if len(came) > 1 else None,
            parameters={} if best is None else dict(best["parameters"]),
            edges=edges,
            extended=extended,
            trials=len(self.tried),
            reached=reached,
            diverged=sum(bool(record["diverged"]) for record in self.tried),
            repeated=repeated,
            rejected=rejected,
        )


def _fit_hints(space: Space, hints: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return hints as far as the space allows, each once."""
    fitting: list[dict[str, float]] = []
    for hint in hints:
        clipped = {dimension.name: dimension.clip(hint[dimension.name]) for dimension in space}
        if clipped not in fitting:
            fitting.append(clipped)
    return fitting


def _name(edges: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({end})" for name, end in edges.items())


def _mix(*numbers: int) -> int:
    """Return a seed that differs between all combinations of numbers."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

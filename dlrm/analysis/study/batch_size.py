"""`recforge study batch-size`: how many steps and samples a goal takes at each batch size, tuned anew for each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import tyro

from dlrm.analysis.study.flags import Asked, StudyConfig, run_asked
from dlrm.analysis.study.held_settings import set_batch_size
from dlrm.analysis.study.space import Dimension, Space, apply_parameters, parse_space, read_setting
from dlrm.analysis.study.steps_to_result import BatchResult, Protocol, Request, steps_to_result
from dlrm.analysis.study.study_folder import StudyFolder
from dlrm.config import EvaluationConfig, RunConfig
from dlrm.diverged import DivergedError
from dlrm.training.run_log import write_json

if TYPE_CHECKING:
    from dlrm.analysis.study.trial_run import TrialRunner

KIND, RESULT = "batch-size", "result.json"
LEAST_BATCH = 16
DESCRIPTION = """Find the fewest steps and samples to a goal for each batch size, with learning rates, warm-ups and
decay tuned anew for each, and from these the critical batch. A trial is a run of at most --epochs, which ends as soon
as the valid split's --evaluation.metric comes to --goal. The same command with the same --output goes on where it was
stopped."""


@dataclass(frozen=True, kw_only=True)
class BatchSizeSettings:
    """What is tried."""

    batches: tuple[int, ...] = ()
    """Batch sizes; none means powers of two times the recipe's, from a quarter of it to 16 times it, as far as an epoch
    has rows."""
    goal: float | None = None
    """Of --evaluation.metric on the valid split; none means what the recipe itself reaches after half of --epochs."""
    trials: int = 12
    """Of each batch size; half as many more where the best one lies at the edge of a range."""
    repeats: int = 3
    """Of each batch size's best trial, with other seeds; their mean is reported, their deviation is the spread."""
    space: tuple[str, ...] = ()
    """Ranges as SETTING=LOW:HIGH, by their logarithm, or SETTING=LOW:HIGH:linear; settings joined by + are set alike.
    None means both learning rates up to 16 times lower and higher, both warm-ups, and decay."""
    abort_factor: float = 2.0
    """A trial stops after so many times the samples of the best one of its batch size."""
    evaluations: int = 30
    """Of the valid split within --epochs; between two, the metric is taken to go in a straight line."""
    least_reached: float = 0.1
    """A batch size of whose trials a smaller share came to the goal is not believed."""

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("repeats", 0), ("evaluations", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected at least {least}, got {getattr(self, name)}")
        if any(batch < 1 for batch in self.batches) or len(set(self.batches)) < len(self.batches):
            raise ValueError(f"--batches: expected different sizes of at least 1, got {self.batches}")
        if not self.abort_factor > 1:
            raise ValueError(f"--abort-factor: expected a number above 1, got {self.abort_factor}")
        if not 0 <= self.least_reached <= 1:
            raise ValueError(f"--least-reached: expected a share in [0, 1], got {self.least_reached}")


@dataclass(frozen=True, kw_only=True)
class BatchSizeConfig(StudyConfig):
    """A recipe, and how its batch size is studied."""

    study: tyro.conf.OmitArgPrefixes[BatchSizeSettings] = field(default_factory=BatchSizeSettings)


def run_batch_size(argv: list[str]) -> int:
    """Study the batch size of what `argv` names: a recipe or a configuration file, then flags."""
    return run_asked(KIND, BatchSizeConfig, argv, description=DESCRIPTION, study=study_batch_size)


def study_batch_size(asked: Asked[BatchSizeConfig]) -> str:
    """Run the study, or what is left of it, and return its verdict.

    Raises:
        ValueError: the space does not fit the recipe, or the folder holds another study.
    """
    from dlrm.analysis.study.batch_size_page import write_batch_size_page
    from dlrm.analysis.study.trial_run import TrialRunner

    settings, run = asked.config.study, asked.run
    runner = TrialRunner(asked.recipe_name, asked.recipe, run, asked.folder)
    batches = choose_batches(settings.batches, run.step.global_batch_size, runner.epoch_samples)
    check_batches(run, batches)
    total = len(batches) * (settings.trials + settings.repeats) + (settings.goal is None)
    described = asked.settings() | {"data": runner.dataset.fingerprint}
    with StudyFolder(asked.folder, kind=KIND, settings=described, total=total) as study:
        print(f"recforge: study {asked.folder}", file=sys.stderr)
        most = run.epochs * runner.epoch_samples
        space = parse_space(settings.space) or default_space(run, most)
        check_space(run, space)
        trainers = Trainers(runner, run, most_samples=most, evaluations=settings.evaluations)
        protocol = Protocol(
            goal=settings.goal if settings.goal is not None else trainers.find_goal(study),
            higher_is_better=run.evaluation.metric == "auc",
            trials=settings.trials,
            repeats=settings.repeats,
            most_samples=most,
            abort_factor=settings.abort_factor,
            least_reached=settings.least_reached,
            seed=run.seed,
            first=first_parameters(run, space),
        )
        results = steps_to_result(
            lambda request: trainers.start(request, protocol.goal), batches, space, protocol, study
        )
        write_json(asked.folder / RESULT, describe(results, protocol, run))
        return write_batch_size_page(study, results, protocol, space, run, name=asked.recipe_name)


class Trainers:
    """Makes the runs that the search asks for.

    Args:
        runner: trains them.
        run: what they have in common.
        most_samples: of one.
        evaluations: within that.
    """

    def __init__(self, runner: TrialRunner, run: RunConfig, *, most_samples: float, evaluations: int) -> None:
        self.runner = runner
        self.every_samples = max(1, round(most_samples / evaluations))
        self.run = run
        self.most_samples = most_samples

    def find_goal(self, study: StudyFolder) -> float:
        """Return what the recipe as it stands reaches after half of the samples, and record it as a trial.

        Raises:
            ValueError: it diverged.
        """

        def train() -> dict[str, float]:
            config = replace(self.run, epochs=self.most_samples / 2 / self.runner.epoch_samples)
            values = [value for _, value in self._train("goal", config, None)]
            if not values:
                raise ValueError(f"--goal: expected a number, as no evaluation gave the {self.run.evaluation.metric}")
            return {"goal": (max if self.run.evaluation.metric == "auc" else min)(values)}

        try:
            goal = float(study.trial("goal", train)["goal"])
        except DivergedError as error:
            raise ValueError(f"--goal: the recipe as it stands gives none; {error}") from error
        study.say(f"goal: {self.run.evaluation.metric} {goal:.5f}")
        return goal

    def start(self, request: Request, goal: float) -> list[tuple[float, float]]:
        """Train a run up to a goal, and return its evaluations.

        Raises:
            DivergedError: its hyperparameters are not accepted, or its loss or weights were not finite.
        """
        try:
            config = apply_parameters(set_batch_size(self.run, request.batch_size), request.parameters)
        except ValueError as error:
            raise DivergedError(str(error)) from error
        config = replace(
            config,
            seed=request.seed,
            epochs=request.most_samples / self.runner.epoch_samples,
        )
        return self._train(request.name, config, goal)

    def _train(self, name: str, config: RunConfig, goal: float | None) -> list[tuple[float, float]]:
        evaluation = EvaluationConfig(
            every_samples=self.every_samples,
            batch_size=config.evaluation.batch_size,
            metric=config.evaluation.metric,
            stop_at=goal,
            test_best=False,
        )
        run = self.runner.run(name, replace(config, evaluation=evaluation))
        if run.diverged:
            raise DivergedError(run.diverged)
        records = [(record["samples"], record[evaluation.metric]) for record in run.records("valid")]
        return [(float(samples), float(value)) for samples, value in records if value is not None]


def choose_batches(asked: Sequence[int], batch_size: int, most: int) -> list[int]:
    """Return the batch sizes to study in rising order: those asked for, or the default ones that an epoch has rows for.

    Raises:
        ValueError: there are fewer rows in an epoch than in a batch.
    """
    chosen = sorted(asked) or [size for size in default_batches(batch_size) if size <= most]
    if not chosen or chosen[-1] > most:
        got = chosen[-1] if chosen else batch_size
        raise ValueError(f"--batches: expected at most the {most} rows of an epoch in a batch, got {got}")
    return chosen


def default_batches(batch_size: int) -> list[int]:
    """Return sizes from a quarter of one to 16 times it."""
    return [size for size in (batch_size * 2**k // 4 for k in range(7)) if size >= min(LEAST_BATCH, batch_size)]


def default_space(run: RunConfig, most_samples: float) -> Space:
    """Return what is tuned where nothing else is asked for: both learning rates, both warm-ups, and decay."""
    rates = {
        "dense.learning_rate": run.dense.learning_rate,
        "tables.learning_rate": run.tables.learning_rate,
    }
    return (
        *(Dimension(name=name, low=rate / 16, high=16 * rate) for name, rate in rates.items()),
        *(
            Dimension(name=f"{group}.warmup_samples", low=0, high=most_samples / 4, log=False, ends=("low",))
            for group in ("dense_schedule", "tables_schedule")
        ),
        # A decay four times as long as the run is as good as none.
        Dimension(
            name="dense_schedule.decay_samples+tables_schedule.decay_samples",
            low=most_samples / 8,
            high=4 * most_samples,
            ends=("high",),
        ),
    )


def check_batches(run: RunConfig, batches: Sequence[int]) -> None:
    """Check that a recipe accepts every batch size, as one does not whose schedule says them.

    Raises:
        ValueError: naming the batch size, and what does not accept it.
    """
    for batch in batches:
        try:
            set_batch_size(run, batch)
        except ValueError as error:
            raise ValueError(f"--batches {batch}: {error}") from error


def check_space(run: RunConfig, space: Space) -> None:
    """Check that a recipe accepts both ends of every range.

    Raises:
        ValueError: naming the range, and what does not accept it.
    """
    for dimension in space:
        for value in (dimension.low, dimension.high):
            try:
                apply_parameters(run, {dimension.name: value})
            except ValueError as error:
                raise ValueError(f"--space {dimension.name}={dimension.low:g}:{dimension.high:g}: {error}") from error


def first_parameters(run: RunConfig, space: Space) -> dict[str, float]:
    """Return the recipe's own values of what is tuned; the middle of a range where it has none.

    A decay over 0 samples is none at all, to which the longest one comes nearest.
    """
    return {dimension.name: _first_value(run, dimension) for dimension in space}


def _first_value(run: RunConfig, dimension: Dimension) -> float:
    path = dimension.name.split("+")[0]
    value = read_setting(run, path)
    if value is None:
        return dimension.at(0.5)
    return dimension.high if path.endswith(".decay_samples") and value == 0 else dimension.clip(value)


def describe(results: list[BatchResult], protocol: Protocol, run: RunConfig) -> dict[str, object]:
    """Return the result as JSON has it."""
    return {
        "metric": run.evaluation.metric,
        "goal": protocol.goal,
        "batches": [{**asdict(result), "steps": result.steps} for result in results],
    }

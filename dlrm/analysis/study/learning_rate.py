"""`recforge study learning-rate`: policies of the learning rate by quality, cost and robustness."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import tyro

from dlrm.analysis.study.compare_policies import PolicyResult, common_goal, compare_policies
from dlrm.analysis.study.flags import Asked, StudyConfig, run_asked
from dlrm.analysis.study.policies import DEFAULT, Policy, choose_policies
from dlrm.analysis.study.study_folder import StudyFolder
from dlrm.config import RunConfig
from dlrm.training.run_log import write_json

KIND, RESULT = "learning-rate", "result.json"
DESCRIPTION = """Compare policies of the learning rate. Each trains --epochs with each of --factors on both learning
rates; the best factor on the valid split is then trained with --seeds other seeds, and these are what is compared: by
--evaluation.metric, samples to a common goal, the gap between test and train loss, and confidence. The same command
with the same --output goes on where it was stopped."""


@dataclass(frozen=True, kw_only=True)
class LearningRateSettings:
    """What is compared."""

    policies: tuple[str, ...] = DEFAULT
    """Policies by name; docs/studies.md lists them."""
    own: tuple[str, ...] = ()
    """Further policies, each as NAME=FLAGS with flags of `recforge train`."""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """On both learning rates, of which each policy takes the best; one alone needs no trial to be chosen."""
    seeds: int = 3
    """Runs of each policy that are reported; the factor was chosen with another seed."""
    goal: float | None = None
    """To which samples and steps are counted; none means what the least good run of all comes to."""
    evaluations: int = 20
    """Of the valid split within --epochs."""
    range_span: tuple[float, float] = (0.01, 100.0)
    """Least and greatest factor on the learning rates in a range test."""
    range_share: float = 0.2
    """Samples of a range test, as a share of --epochs; they count as cost."""

    def __post_init__(self) -> None:
        for name in ("seeds", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if not self.factors or min(self.factors) <= 0 or len(set(self.factors)) < len(self.factors):
            raise ValueError(f"--factors: expected different numbers above 0, got {self.factors}")
        if not 0 < self.range_span[0] < self.range_span[1]:
            raise ValueError(f"--range-span: expected two rising numbers above 0, got {self.range_span}")
        if not 0 < self.range_share <= 1:
            raise ValueError(f"--range-share: expected a share in (0, 1], got {self.range_share}")


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig(StudyConfig):
    """A recipe, and how its learning rate is studied."""

    study: tyro.conf.OmitArgPrefixes[LearningRateSettings] = field(default_factory=LearningRateSettings)


def run_learning_rate(argv: list[str]) -> int:
    """Study the learning rate of what `argv` names: a recipe or a configuration file, then flags."""
    return run_asked(KIND, LearningRateConfig, argv, description=DESCRIPTION, study=study_learning_rate)


def study_learning_rate(asked: Asked[LearningRateConfig]) -> str:
    """Run the study, or what is left of it, and return its verdict.

    Raises:
        ValueError: a policy does not exist or does not fit, or the folder holds another study.
    """
    from dlrm.analysis.study.learning_rate_page import write_learning_rate_page
    from dlrm.analysis.study.policy_runs import PolicyTrainer
    from dlrm.analysis.study.trial_run import TrialRunner

    settings, run = asked.config.study, asked.run
    runner = TrialRunner(asked.recipe_name, asked.recipe, run, asked.folder)
    samples = run.epochs * runner.epoch_samples
    policies = choose_policies(settings.policies, settings.own, samples)
    for policy in policies:
        policy.configure(run)
    factors = {policy.name: list_factors(policy, settings.factors) for policy in policies}
    described = asked.settings() | {"data": runner.dataset.fingerprint}
    total = count_trials(policies, factors, settings.seeds)
    higher_is_better = run.evaluation.metric == "auc"
    with StudyFolder(asked.folder, kind=KIND, settings=described, total=total) as study:
        print(f"recforge: study {asked.folder}", file=sys.stderr)
        trainer = PolicyTrainer(
            runner,
            run,
            {policy.name: policy for policy in policies},
            evaluations=settings.evaluations,
            span=settings.range_span,
            range_samples=settings.range_share * samples,
            study=study,
        )
        results = compare_policies(
            trainer.train,
            [policy.name for policy in policies],
            factors,
            seeds=settings.seeds,
            first_seed=run.seed,
            higher_is_better=higher_is_better,
            study=study,
        )
        goal = settings.goal if settings.goal is not None else common_goal(results, higher_is_better=higher_is_better)
        write_json(asked.folder / RESULT, describe(results, goal, run))
        return write_learning_rate_page(study, results, policies, goal, run, name=asked.recipe_name)


def list_factors(policy: Policy, factors: Sequence[float]) -> list[float | None]:
    """Return the factors that a policy is tried with; [None] where it finds its own."""
    return [None] if policy.explores else list(factors)


def count_trials(policies: Sequence[Policy], factors: Mapping[str, Sequence[float | None]], seeds: int) -> int:
    """Return how many trials there will be."""
    chosen = [len(factors[policy.name]) for policy in policies]
    return (
        sum(count if count > 1 else 0 for count in chosen) + seeds * len(policies) + sum(p.explores for p in policies)
    )


def describe(results: Sequence[PolicyResult], goal: float | None, run: RunConfig) -> dict[str, object]:
    """Return the result as JSON has it, best policy first."""
    names = ("test_auc", "test_logloss", "gap", "confidence", "confidence_deviation")
    return {
        "metric": run.evaluation.metric,
        "goal": goal,
        "policies": [
            {
                "policy": result.policy,
                "factor": result.factor,
                "value": result.value,
                "deviation": result.deviation,
                **{name: result.mean(name) for name in names},
            }
            for result in results
        ],
    }

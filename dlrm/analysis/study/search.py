"""Which hyperparameters to try next, as a function of what was tried: what was killed proposes the same again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dlrm.analysis.study.space import Dimension, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Spread over the space before the search has anything to go by.
FIRST = 5


def spread_first(space: Space, seed: int) -> list[dict[str, float]]:
    """Return `FIRST` points such that each fifth of every range has one: a Latin hypercube."""
    import numpy as np

    generator = np.random.default_rng(seed)
    columns = {
        dimension.name: [
            dimension.at((stratum + generator.random()) / FIRST) for stratum in generator.permutation(FIRST)
        ]
        for dimension in space
    }
    return [{name: float(values[number]) for name, values in columns.items()} for number in range(FIRST)]


def propose(space: Space, tried: Sequence[tuple[Mapping[str, float], float]], seed: int) -> dict[str, float]:
    """Return the hyperparameters of the next trial, by optuna's tree of Parzen estimators.

    Every call makes the sampler anew, so that nothing depends on what was drawn before: a study that goes on after a
    kill does what it would have done, without a state of its own to be saved.

    Args:
        space: to search.
        tried: hyperparameters within the space, and what they cost: the less, the better.
        seed: of the draw; another one for each trial.

    Raises:
        ValueError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError("recforge study: optuna is not installed; run: pip install 'recforge[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {dimension.name: _distribution(dimension) for dimension in space}
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=1)
    search = optuna.create_study(sampler=sampler)
    for parameters, cost in tried:
        search.add_trial(
            optuna.trial.create_trial(params=dict(parameters), distributions=distributions, value=float(cost))
        )
    asked = search.ask(distributions).params
    return {dimension.name: float(asked[dimension.name]) for dimension in space}


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import FloatDistribution

    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)

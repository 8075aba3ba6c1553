"""Policies of the learning rate that a study compares: names for flags of `recforge train`; free of torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dlrm.cli import parse
from dlrm.config import RunConfig
from dlrm.optim.config import OPTIONS, DenseOptimizerConfig, DenseOptimizerName, is_given
from dlrm.optim.lr_schedules import Schedule

# What has a learning rate, of its own or not, and what a rate's schedule is called.
GROUPS = ("dense", "head", "tables", "small_tables")
SCHEDULES = tuple(f"{group}_schedule" for group in GROUPS)
FORMULA, STATE, EXPLORATION, OWN = "formula", "state", "exploration", "as given"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a learning rate goes.

    Attributes:
        name: of the policy.
        family: whether it is a formula of samples, follows the state of a run, or explores first.
        words: what it does.
        flags: of `recforge train`.
        keeps_schedules: whether the recipe's own schedules stay in place.
        explores: whether a range test finds its rates.
        optimizer: of the dense part, told nothing but the recipe's rate and decay; None keeps the recipe's.
        moves_only_tables: whether a factor has no say in the dense part's rate, which the policy finds by itself.
    """

    name: str
    family: str
    words: str
    flags: tuple[str, ...] = ()
    keeps_schedules: bool = False
    explores: bool = False
    optimizer: DenseOptimizerName | None = None
    moves_only_tables: bool = False

    def configure(self, run: RunConfig, factor: float = 1.0) -> RunConfig:
        """Return a run under this policy.

        Args:
            run: whose schedules it replaces.
            factor: multiplies the learning rates of the dense part and of tables, also those of the head and of small
                tables where they have their own.

        Raises:
            ValueError: a flag does not exist, or its value is not accepted.
        """
        if not self.keeps_schedules:
            run = without_schedules(run)
        if self.optimizer is not None:
            kept = {name: getattr(run.dense, name) for name in ("learning_rate", "weight_decay")}
            run = replace(run, dense=DenseOptimizerConfig(name=self.optimizer, **kept))
        if self.flags:
            try:
                run = parse(RunConfig, self.flags, program="recforge train", default=run)
            except ValueError as error:
                raise ValueError(f"policy {self.name}: {error}") from None
        return replace(run, **{group: _multiply_rate(getattr(run, group), factor) for group in GROUPS})

    def list_flags(self, run: RunConfig, factor: float) -> list[str]:
        """Return flags of `recforge train` that make a run what `configure` does; schedules that it resets are not."""
        config = self.configure(run, factor)
        rates = [(group, getattr(config, group).learning_rate) for group in GROUPS]
        flags = [f"--{group.replace('_', '-')}.learning-rate {rate:.4g}" for group, rate in rates if rate is not None]
        if self.optimizer is not None:
            given = [option for option in OPTIONS if is_given(getattr(run.dense, option))]
            flags += [_take_back(option, getattr(run.dense, option)) for option in given]
            flags.append(f"--dense.name {self.optimizer}")
        return [*map(shlex.quote, self.flags), *flags]  # in this order, as the policy's flags may give a rate too


def without_schedules(run: RunConfig) -> RunConfig:
    """Return a run all of whose rates stay as they are."""
    constant: dict[str, Any] = dict.fromkeys(SCHEDULES, Schedule())
    return replace(run, **constant)


def list_policies(samples: float) -> dict[str, Policy]:
    """Return the policies that have names, for a run of so many samples."""
    whole, warmup = round(samples), max(1, round(samples / 20))
    rest = whole - warmup
    policies = [
        Policy(name="recipe", family=OWN, words="the recipe's own schedules", keeps_schedules=True),
        Policy(name="constant", family=FORMULA, words="one rate from the first to the last sample"),
        _formula("warmup", "a linear warm-up, then one rate", f"warmup({warmup})"),
        _formula("linear", "warm-up, linear decay to 0", f"warmup({warmup}) * poly({rest}, start={warmup}, power=1)"),
        _formula("poly", "warm-up, quadratic decay to 0", f"warmup({warmup}) * poly({rest}, start={warmup}, power=2)"),
        _formula("cosine", "warm-up, half a cosine to 0", f"warmup({warmup}) * cosine({rest}, start={warmup})"),
        _formula(
            "rsqrt",
            "warm-up, one over a square root, a cool-down in the last fifth",
            f"rsqrt({max(1, whole // 10)}, warmup={warmup}, until={whole}, cooldown={whole // 5})",
        ),
        _formula("triangular", "up and down twice", f"triangular({max(1, whole // 2)}, low=0.05)"),
        replace(
            _formula(
                "range-test",
                "a range test finds the rate; then warm-up and quadratic decay",
                f"warmup({warmup}) * poly({rest}, start={warmup}, power=2)",
            ),
            family=EXPLORATION,
            explores=True,
        ),
        Policy(
            name="plateau",
            family=STATE,
            words="warm-up, then half the rate after two evaluations without a gain",
            flags=(*_shape(f"warmup({warmup})"), "--plateau.policy", "reduce", "--plateau.patience", "2"),
        ),
        Policy(
            name="change-on-plateau",
            family=STATE,
            words="warm-up, then a bolder rate after two evaluations without a gain, a calmer one near the end",
            flags=(
                *_shape(f"warmup({warmup})"),
                *("--plateau.policy", "change", "--plateau.shapes", "0.1", "0.3", "1", "2", "--plateau.start", "2"),
            ),
        ),
        Policy(
            name="lanczos",
            family=STATE,
            words="rate and momentum of a dense SGD from the Hessian's eigenvalues; tables as with poly",
            flags=(
                *("--tables-schedule.shape", f"warmup({warmup}) * poly({rest}, start={warmup}, power=2)"),
                *("--curvature-rate.every-samples", str(max(1, whole // 20))),
            ),
            optimizer="sgd",
            moves_only_tables=True,
        ),
    ]
    return {policy.name: policy for policy in policies}


DEFAULT = ("recipe", "constant", "poly", "cosine", "plateau", "range-test", "lanczos")


def choose_policies(names: Sequence[str], own: Sequence[str], samples: float) -> list[Policy]:
    """Return the named policies, then the user's own.

    Args:
        names: of policies of `list_policies`.
        own: each as NAME=FLAGS, flags of `recforge train` as a shell would read them.
        samples: of a run.

    Raises:
        ValueError: there is no such policy, or a name occurs twice.
    """
    known = list_policies(samples)
    chosen = []
    for name in names:
        if name not in known:
            raise ValueError(f"--policies: expected some of {', '.join(known)}, got '{name}'")
        chosen.append(known[name])
    for text in own:
        name, separator, flags = text.partition("=")
        if not name or not separator or name.startswith("-"):
            raise ValueError(f"--own: expected NAME=FLAGS such as 'slow=--dense.learning-rate 1e-4', got '{text}'")
        chosen.append(Policy(name=name, family=OWN, words=flags.strip(), flags=tuple(shlex.split(flags))))
    if len({policy.name for policy in chosen}) < len(chosen) or not chosen:
        raise ValueError(f"--policies: expected different names, got {', '.join(p.name for p in chosen) or 'none'}")
    return chosen


def _multiply_rate(group: Any, factor: float) -> Any:
    return group if group.learning_rate is None else replace(group, learning_rate=factor * group.learning_rate)


def _take_back(option: str, value: Any) -> str:
    """Return the flag that takes an option back."""
    name = option.replace("_", "-")
    return f"--dense.no-{name}" if isinstance(value, bool) else f"--dense.{name} None"


def _formula(name: str, words: str, shape: str) -> Policy:
    return Policy(name=name, family=FORMULA, words=words, flags=_shape(shape))


def _shape(shape: str) -> tuple[str, ...]:
    return ("--dense-schedule.shape", shape, "--tables-schedule.shape", shape)

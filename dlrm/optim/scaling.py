"""Rewrites a configuration for another batch size by a rule, and says what was changed and why.

It happens before anything is built: the run, its `config.json` and whoever continues it know only the numbers after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from dlrm.config import RunConfig, TrainingConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.scaling_rules import GROUPS, Multipliers, ScaledGroup, ScalingRule, parse_rules
from dlrm.optim.schedule_text import parse_formula
from dlrm.tables_config import TablesConfig
from dlrm.training.batch_growth_config import parse_stages

C = TypeVar("C", bound=TrainingConfig)

# What optimizers take for an option that is not given, where a rule multiplies it.
OWN_BETAS = dict.fromkeys(("lamb", "partial_lamb", "adam", "adamw", "cowclip"), (0.9, 0.999))
OWN_EPS = {"lamb": 1e-6, "partial_lamb": 1e-6, "adam": 1e-8, "adamw": 1e-8, "cowclip": 1e-8}
OWN_TABLE_EPS = OWN_EPS | {"adagrad": 1e-8, "rowwise_adagrad": 1e-8}
NUMBERS = ("learning_rate", "weight_decay", "l2", "eps", "betas")
# Beside schedules, what is counted in samples.
LENGTHS = {
    "evaluation": ("every_samples",),
    "checkpoint": ("every_samples",),
    "growth": ("stages", "rewarm_samples"),
    "plateau": ("shapes",),
}
SCHEDULE = tuple(option.name for option in fields(Schedule))


@dataclass(frozen=True, kw_only=True)
class Change:
    """A hyperparameter by its flag, before and after scaling, and why; the two may be equal."""

    flag: str
    before: Any
    after: Any
    reason: str


def scale_config(config: C) -> tuple[C, tuple[Change, ...]]:
    """Return the configuration for its batch size, given that its numbers were chosen for one of `scale_from`.

    Args:
        config: whose `scale_from`, `rule` and `match` say what to do; without `scale_from`, nothing.

    Returns:
        The scaled configuration, and every hyperparameter that the rule looks at, whether it changed or not.

    Raises:
        ValueError: a scaled number is out of range, naming its flag.
    """
    if config.scale_from is None:
        return config, ()
    ratio = config.step.global_batch_size / config.scale_from
    lengths = ratio if config.match == "updates" else 1.0
    groups = list_groups(config)
    multipliers = {group.name: rule_of(config, group.name).multipliers(ratio, group) for group in groups}
    changed: dict[str, Any] = {}
    for group in groups:
        m, schedule = multipliers[group.name], f"{group.name}_schedule"
        changed[schedule] = _scale_schedule(getattr(config, schedule), m, lengths)
        if group.name == "head":
            changed[group.name] = _scale_head(config, group, m, changed["dense"])
        elif group.name == "small_tables":
            changed[group.name] = _scale_small_tables(config, group, m, changed["tables"])
        elif hasattr(config, group.name):
            changed[group.name] = _scale_optimizer(getattr(config, group.name), group, m)
    scaled = replace(config, **changed, **_scale_lengths(config, lengths))
    return scaled, tuple(_list_changes(config, scaled, multipliers))


def rule_of(config: TrainingConfig, group: str) -> ScalingRule:
    """Return a group's rule: its own of `--rules`, or `--rule`, which is auto where a base is given without one."""
    own = parse_rules(config.rules).get(group)
    name = own or config.rule or ("auto" if config.scale_from is not None else "none")
    return ScalingRule(name=name, power=config.rule_power)


def follow_batch_size(config: TrainingConfig) -> Callable[[int, str], float]:
    """Return what multiplies a group's learning rate when the batch size is another than the run began with.

    That is the rate of the group's rule, if there is one or one has scaled the configuration, but for a batch that
    grows instead of a decay of the rate, which has to stay as it is, and for stages of a schedule, which say their
    rates themselves.
    """
    is_final = config.growth.instead_of_decay or bool(config.staged_batches)
    rules = {group: ScalingRule() if is_final else rule_of(config, group) for group in GROUPS}
    groups, base = {group.name: group for group in list_groups(config)}, config.step.global_batch_size

    def factor(batch_size: int, group: str) -> float:
        return rules[group].multipliers(batch_size / base, groups.get(group, ScaledGroup(name=group))).learning_rate

    return factor


def list_groups(config: TrainingConfig) -> list[ScaledGroup]:
    """Return the groups of parameters whose hyperparameters are scaled."""
    head = config.head.name or config.dense.name
    groups = [ScaledGroup(name="dense", optimizer=config.dense.name), ScaledGroup(name="head", optimizer=head)]
    tables: TablesConfig | None = getattr(config, "tables", None)  # of those who have some
    if tables is not None:
        groups.append(ScaledGroup(name="tables", optimizer=tables.optimizer, is_rare=config.rows_are_rare))
    if isinstance(config, RunConfig) and config.small_tables.below_rows:
        small = config.small_tables.optimizer or config.tables.optimizer
        groups.append(ScaledGroup(name="small_tables", optimizer=small))
    return groups


def _scale_optimizer(config: Any, group: ScaledGroup, m: Multipliers) -> Any:
    """Multiply what an optimizer's configuration gives, and what it would take where the rule changes that."""
    own_eps = (OWN_TABLE_EPS if group.is_table else OWN_EPS).get(group.optimizer)
    changed: dict[str, Any] = {}
    for option, factor, own in (
        ("learning_rate", m.learning_rate, None),
        ("weight_decay", m.weight_decay, None),
        ("l2", m.weight_decay, None),
        ("eps", m.eps, own_eps),
    ):
        value = getattr(config, option, None)
        if value is None and factor != 1.0 and hasattr(config, option):
            value = own
        if value is not None:
            changed[option] = value * factor
    own_betas = OWN_BETAS.get(group.optimizer)
    if m.forgetting != 1.0 and own_betas is not None and hasattr(config, "betas"):
        changed["betas"] = tuple(max(0.0, 1.0 - m.forgetting * (1.0 - beta)) for beta in config.betas or own_betas)
    return replace(config, **changed)


def _scale_head(config: TrainingConfig, group: ScaledGroup, m: Multipliers, dense: Any) -> Any:
    """Scale what the head is told, and write down its rate where it is no longer that of the dense part."""
    scaled = _scale_optimizer(config.head, group, m)
    wanted = config.head.resolve(config.dense).learning_rate * m.learning_rate
    is_own = scaled.learning_rate is None and wanted != dense.learning_rate
    return replace(scaled, learning_rate=wanted) if is_own else scaled


def _scale_small_tables(config: Any, group: ScaledGroup, m: Multipliers, tables: Any) -> Any:
    """Scale what small tables are told or take from the others, and write down where they differ from those now."""
    scaled = _scale_optimizer(config.small_tables.resolve(config.tables), group, m)
    given = [option for option in NUMBERS if getattr(config.small_tables, option) is not None]
    otherwise = config.small_tables.resolve(tables)
    differing = [option for option in NUMBERS if getattr(scaled, option) != getattr(otherwise, option)]
    return replace(config.small_tables, **{option: getattr(scaled, option) for option in {*given, *differing}})


def _scale_schedule(schedule: Schedule, m: Multipliers, lengths: float) -> Schedule:
    """Stretch all of a schedule, or only its warm-up, at the cost of what follows it."""
    warmups = m.warmup if lengths == 1.0 else 1.0  # all lengths times k keep the steps of a warm-up already
    shape = str(parse_formula(schedule.shape).stretch(lengths, warmups)) if schedule.shape else ""
    warmup, hold, decay = (
        lengths * samples for samples in (schedule.warmup_samples, schedule.hold_samples, schedule.decay_samples)
    )
    wanted, end = warmup * warmups, warmup + hold + decay
    if decay:
        wanted = min(wanted, max(warmup, m.longest_warmup * end))
        hold = max(0.0, hold - (wanted - warmup))
        decay = max(1.0, end - wanted - hold)
    numbers = {"warmup_samples": round(wanted), "hold_samples": round(hold), "decay_samples": round(decay)}
    return replace(schedule, **numbers, shape=shape)


def _scale_lengths(config: TrainingConfig, lengths: float) -> dict[str, Any]:
    if lengths == 1.0:
        return {}
    changed: dict[str, Any] = {"epochs": config.epochs * lengths}
    for name in ("evaluation", "checkpoint"):
        part: Any = getattr(config, name)
        if part.every_samples is not None:
            changed[name] = replace(part, every_samples=max(1, round(part.every_samples * lengths)))
    stages = ((round(start * lengths), size) for start, size in parse_stages(config.growth.stages))
    changed["growth"] = replace(
        config.growth,
        stages=tuple(f"{start}={size}" for start, size in stages),
        rewarm_samples=round(config.growth.rewarm_samples * lengths),
    )
    shapes = (str(formula.stretch(lengths)) for formula in config.plateau.formulas())
    changed["plateau"] = replace(config.plateau, shapes=tuple(shapes))
    return changed


def _list_changes(
    before: TrainingConfig, after: TrainingConfig, multipliers: dict[str, Multipliers]
) -> Iterator[Change]:
    for group in list_groups(before):
        reason, schedule = multipliers[group.name].reason, f"{group.name}_schedule"
        own = {"eps": OWN_TABLE_EPS.get(group.optimizer), "betas": OWN_BETAS.get(group.optimizer)}
        if group.name == "small_tables" and isinstance(before, RunConfig):
            own |= {option: getattr(before.small_tables.resolve(before.tables), option) for option in NUMBERS}
        if hasattr(before, group.name):
            yield from _compare(before, after, group.name, NUMBERS, reason, own)
        yield from _compare(
            before, after, schedule, SCHEDULE, reason if before.match == "epochs" else "--match updates"
        )
    yield from _compare(before, after, "", ("epochs",), "--match updates")
    for part, options in LENGTHS.items():
        yield from _compare(before, after, part, options, "--match updates")


def _compare(
    before: Any, after: Any, part: str, options: Sequence[str], reason: str, own: Mapping[str, Any] | None = None
) -> Iterator[Change]:
    """Compare settings of one part, but for those that neither differ from their defaults nor were changed.

    Args:
        before: the whole configuration.
        after: as scaled.
        part: field in which the settings are; empty for the configuration itself.
        options: the settings.
        reason: for changes.
        own: what an optimizer takes where a setting is None.
    """
    old, new = (getattr(config, part) if part else config for config in (before, after))
    defaults = {item.name: item.default for item in fields(old)}
    for option in options:
        was, now = getattr(old, option, None), getattr(new, option, None)
        if was == now and (was is None or (option != "learning_rate" and was == defaults.get(option))):
            continue
        flag = "--" + ".".join(name.replace("_", "-") for name in (part, option) if name)
        told = (own or {}).get(option) if was is None else was
        yield Change(flag=flag, before=told, after=now, reason=reason if was != now else "")

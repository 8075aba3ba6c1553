"""What happens to the hyperparameters when the batch gets k times as large: published rules, each a starting point.

No rule is reliable everywhere (Shallue et al. 2019, arXiv:1811.03600, find none): a rule says where to begin tuning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

RuleName = Literal["none", "linear", "sqrt", "power", "sde", "legw", "adascale", "cowclip", "auto"]
GROUPS = ("dense", "head", "tables", "small_tables")
LINEAR_UP_TO = 8.0  # from where on linear scaling of SGD tends to diverge; published limits are 8 to 16
LAMB_WARMUP = 0.2  # share of the run that the longest warm-up in LAMB's paper takes
ADAGRAD = "Adagrad: unchanged, as its sums of squares shrink with the noise"
RATE_ONLY = {"none": 0.0, "linear": 1.0, "sqrt": 0.5, "legw": 0.5, "adascale": 0.0}


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """What a rule multiplies.

    Attributes:
        learning_rate: as is.
        weight_decay: as is.
        eps: of the denominator.
        forgetting: 1 - beta of each moment, which stays at most 1.
        warmup: length of the warm-up in samples; k keeps the number of its steps.
        longest_warmup: as a share of a schedule that has an end; a warm-up that was longer before stays.
        reason: for all that, in words.
    """

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    forgetting: float = 1.0
    warmup: float = 1.0
    longest_warmup: float = math.inf
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ScaledGroup:
    """Weights with an optimizer and a rate of their own, as a rule sees them.

    Attributes:
        name: `dense`, `head`, `tables` or `small_tables`.
        optimizer: as `--dense.name` or `--tables.optimizer` has it.
        is_rare: of tables: whether no row occurs in most batches; None where that is not known.
    """

    name: str = "dense"
    optimizer: str = "lamb"
    is_rare: bool | None = None

    @property
    def is_table(self) -> bool:
        """Whether it is rows of tables."""
        return self.name.endswith("tables")


@dataclass(frozen=True, kw_only=True)
class ScalingRule:
    """A rule by its name; all are told in docs/schedules.md.

    Attributes:
        name: as is.
        power: of the rule `power`.
    """

    name: RuleName = "none"
    power: float = 0.5

    def multipliers(self, k: float, group: ScaledGroup) -> Multipliers:
        """Return what changes for a group with a batch k times as large; k may be below 1.

        Raises:
            ValueError: k is not above 0.
        """
        if not 0.0 < k < math.inf:
            raise ValueError(f"expected a ratio of batch sizes above 0, got {k}")
        if self.name == "sde":
            return _scale_as_sde(k, group)
        if self.name == "cowclip":
            return _scale_as_cowclip(k, group)
        if self.name == "auto":
            return _scale_table(k, group) if group.is_table else _scale_dense(k, group)
        power = self.power if self.name == "power" else RATE_ONLY[self.name]
        if self.name == "sqrt" and group.optimizer == "lamb" and not group.is_table:
            return _scale_lamb(k)
        words = {"none": "unchanged", "linear": "k", "sqrt": "sqrt(k)", "legw": "sqrt(k), a warm-up of as many steps"}
        reason = words.get(self.name, f"k ** {power:g}" if self.name == "power" else "times a gain measured per step")
        return Multipliers(learning_rate=k**power, warmup=k if self.name == "legw" else 1.0, reason=reason)


def parse_rules(texts: tuple[str, ...]) -> dict[str, RuleName]:
    """Return the rules of groups that have one of their own, written as GROUP=RULE.

    Raises:
        ValueError: naming the flag, for another group or rule.
    """
    # AdaScale's gain is that of the whole step, which all groups take together.
    names = {name: name for name in get_args(RuleName) if name != "adascale"}
    rules: dict[str, RuleName] = {}
    for text in texts:
        group, _, name = text.partition("=")
        if group not in GROUPS or name not in names:
            raise ValueError(
                f"--rules: expected GROUP=RULE with a group of {', '.join(GROUPS)} and a rule of {', '.join(names)}, "
                f"got {text}"
            )
        rules[group] = names[name]
    return rules


def rows_are_rare(top_share: float, global_batch_size: int) -> bool:
    """Whether a table's most frequent row occurs less than once per batch, and so every row does.

    Args:
        top_share: share of the samples in which that row occurs.
        global_batch_size: samples of a step.
    """
    return top_share * global_batch_size < 1.0


def adascale_gain(variance: float, squared_norm: float, ratio: float, *, adaptive: bool = False) -> float:
    """Return AdaScale's gain: by how much one step with the larger batch counts more than one with the base batch.

    (variance + squared_norm) / (variance / ratio + squared_norm), which lies between 1 and `ratio` (Johnson et al.
    2020, arXiv:2007.05105). The learning rate is multiplied by it, and the schedule advances by it rather than by the
    ratio, as the run has come so far in steps of the base batch.

    Args:
        variance: of the gradient of a base batch: the trace of its covariance.
        squared_norm: of the true gradient; below 0, as an unbiased estimate may be, counts as 0.
        ratio: batch size / base batch size.
        adaptive: for optimizers that divide by the gradient's size: the root of the gain.
    """
    noise, signal = max(variance, 0.0), max(squared_norm, 0.0)
    below = noise / ratio + signal
    gain = (noise + signal) / below if below > 0.0 else 1.0
    return math.sqrt(gain) if adaptive else gain


def mccandlish_rate(batch_size: float, *, noise_scale: float, full_rate: float) -> float:
    """Return SGD's best rate: full_rate / (1 + noise_scale / batch_size) (McCandlish et al. 2018, arXiv:1812.06162).

    Args:
        batch_size: as is.
        noise_scale: batch size at which it is half of that without noise.
        full_rate: best rate without noise.
    """
    return full_rate / (1.0 + noise_scale / batch_size)


def surge_rate(batch_size: float, *, peak_batch_size: float, peak_rate: float) -> float:
    """Return Adam's best rate: it rises as a root up to a peak, and falls behind it (Li et al. 2024, arXiv:2405.14578).

    peak_rate / (0.5 * (sqrt(peak_batch_size / B) + sqrt(B / peak_batch_size))).
    """
    ratio = math.sqrt(peak_batch_size / batch_size)
    return peak_rate / (0.5 * (ratio + 1.0 / ratio))


def _scale_as_sde(k: float, group: ScaledGroup) -> Multipliers:
    """Keep the stochastic differential equation that small steps follow (Malladi et al. 2022, arXiv:2205.10287)."""
    if group.optimizer == "sgd":
        return Multipliers(learning_rate=k, reason="k: SGD's equation")
    root = math.sqrt(k)
    return Multipliers(
        learning_rate=root, forgetting=k, eps=1.0 / root, reason="sqrt(k), moments forget k times faster"
    )


def _scale_as_cowclip(k: float, group: ScaledGroup) -> Multipliers:
    """Leave the rows' rate, and enlarge their L2 as fewer steps apply it (Zheng et al. 2022, arXiv:2204.06240)."""
    if group.is_table:
        return Multipliers(weight_decay=k, reason="rate of rows unchanged, their decay k: fewer steps apply it")
    return Multipliers(learning_rate=math.sqrt(k), reason="sqrt(k)")


def _scale_dense(k: float, group: ScaledGroup) -> Multipliers:
    if group.optimizer == "sgd":
        near = min(k, LINEAR_UP_TO)
        return Multipliers(
            learning_rate=near * math.sqrt(k / near), reason=f"SGD: k up to {LINEAR_UP_TO:g}, its root beyond"
        )
    if group.optimizer == "lamb":
        return _scale_lamb(k)
    if group.optimizer == "adagrad":
        return Multipliers(reason=ADAGRAD)
    return Multipliers(learning_rate=math.sqrt(k), reason=f"{group.optimizer}: sqrt(k)")


def _scale_lamb(k: float) -> Multipliers:
    """Warm up for as many steps as before (You et al. 2020, arXiv:1904.00962: up to a fifth of the run)."""
    reason = "LAMB: sqrt(k), a warm-up of as many steps up to a fifth of the schedule"
    return Multipliers(learning_rate=math.sqrt(k), warmup=k, longest_warmup=LAMB_WARMUP, reason=reason)


def _scale_table(k: float, group: ScaledGroup) -> Multipliers:
    """Tell rows apart by how often they occur.

    A row that occurs at most once in a batch has a gradient which is k times smaller in a batch k times as large, as it
    is that of the mean. SGD wants the rate times k for that; what divides by the gradient's size takes as many steps as
    long as before, if eps is k times smaller too. A row of every batch is like a dense weight.

    Where noise decides, Adagrad keeps its rate for both: k times fewer squares, each k times smaller, have a root of
    their sum that is k times smaller, which makes up for the k times fewer steps. MLPerf's Adagrad keeps its rate from
    batches of 32 K to 160 K.
    """
    if group.optimizer in ("adagrad", "rowwise_adagrad"):
        return Multipliers(eps=1.0 / k, reason=f"{ADAGRAD}; eps goes with the gradient")
    rare = group.name == "tables" if group.is_rare is None else group.is_rare
    kind = "rare rows" if rare else "rows of most batches"
    if group.optimizer == "sgd":
        if rare:
            return Multipliers(learning_rate=k, reason=f"{kind}, SGD: k, as their gradients are k times smaller")
        return _scale_dense(k, group)
    rate = 1.0 if rare else math.sqrt(k)
    told = "unchanged, as they take as many steps as before" if rare else "sqrt(k), as dense weights"
    return Multipliers(learning_rate=rate, eps=1.0 / k, reason=f"{kind}: {told}; eps goes with the gradient")

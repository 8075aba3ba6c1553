"""Everything a run can be told, as frozen dataclasses; command line, configuration files and recipes all fill these.

The field's docstring is the flag's help. Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dlrm.analysis.curvature.rate_config import CurvatureRateConfig
from dlrm.noise.config import NoiseScaleConfig
from dlrm.optim.config import DenseOptimizerConfig, HeadConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.plateau import PlateauConfig
from dlrm.optim.scaling_rules import RuleName, parse_rules
from dlrm.tables_config import SmallTablesConfig as SmallTablesConfig
from dlrm.tables_config import TablesConfig as TablesConfig
from dlrm.training.adversarial_config import AdversarialConfig
from dlrm.training.batch_growth_config import BatchGrowthConfig

BatchNorm = Literal["none", "ghost"]
Interaction = Literal["dot", "dcn", "fm", "projection"]
Metric = Literal["auc", "logloss", "normalized_entropy"]
ResizedTables = Literal["refuse", "keep"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The DLRM: a bottom MLP on numbers, tables on ids, their interaction, a top MLP."""

    dim: int = 16
    """Length of a table's row, and of the bottom MLP's output."""
    bottom: tuple[int, ...] = (64,)
    """Hidden layers of the bottom MLP; a layer of length `dim` follows."""
    top: tuple[int, ...] = (64, 32)
    """Hidden layers of the top MLP; the logit follows."""
    interaction: Interaction = "dot"
    """How pooled rows and the bottom MLP's output meet."""
    projection: int = 8
    """Vectors that `projection` combines all others into before the products."""
    cross_layers: int = 2
    """Layers of `dcn`."""
    cross_rank: int = 64
    """Rank of a `dcn` layer's weight."""
    dropout: float = 0.0
    """Share of each hidden layer of the top MLP that is zeroed in training."""
    batch_norm: BatchNorm = "none"
    """`ghost` normalises hidden layers of the top MLP before their activation, over `ghost_size` samples at a time."""
    ghost_size: int = 128
    """Samples that `ghost` normalises together: its noise is that of so small a batch, however large the batch is."""

    def __post_init__(self) -> None:
        for name in ("dim", "projection", "cross_layers", "cross_rank"):
            _at_least(1, getattr(self, name), f"--model.{name.replace('_', '-')}")
        for name in ("bottom", "top"):
            for width in getattr(self, name):
                _at_least(1, width, f"--model.{name}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--model.dropout: expected a share in [0, 1), got {self.dropout}")
        _at_least(2, self.ghost_size, "--model.ghost-size")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How one batch is trained."""

    global_batch_size: int = 4096
    """Samples per step, over all ranks; --global-batch-size for short."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the dense part; rows, loss and optimizers stay in fp32. tf32 shortens a GPU's factors only."""
    compile: bool = False
    """Run the dense part through torch.compile (needs a C++ compiler; the first steps wait for it)."""
    cuda_graphs: bool = False
    """Replay the compiled dense part as CUDA graphs: less work for the CPU, one more copy of its input on the GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one, but not for sequences."""
    threads: int | None = None
    """CPU threads; None means every core this process may use."""

    def __post_init__(self) -> None:
        _at_least(1, self.global_batch_size, "--step.global-batch-size")
        if self.cuda_graphs and not self.compile:
            raise ValueError("--step.cuda-graphs: expected --step.compile beside it, got none")
        if self.threads is not None:
            _at_least(1, self.threads, "--step.threads")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When the model is measured, on what, and what follows from it."""

    every_samples: int | None = None
    """Evaluate on the valid split after so many training samples; None means once per epoch."""
    batch_size: int = 8192
    """Samples per forward pass; has no influence on the result."""
    metric: Metric = "auc"
    """Decides which checkpoint is the best one."""
    stop_at: float | None = None
    """Stop as soon as the metric is at least this good on the valid split."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a better metric."""
    segment_by: str | None = None
    """Also report AUC within each value of this feature (one id per row)."""
    test_best: bool = True
    """Measure the test split with the best checkpoint rather than with the last weights."""

    def __post_init__(self) -> None:
        _at_least(1, self.batch_size, "--evaluation.batch-size")
        for name in ("every_samples", "patience"):
            if getattr(self, name) is not None:
                _at_least(1, getattr(self, name), f"--evaluation.{name.replace('_', '-')}")

    def is_out_of_patience(self, evaluations_without_gain: int) -> bool:
        """Whether to stop after so many evaluations in a row without a better metric."""
        return self.patience is not None and evaluations_without_gain >= self.patience


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state of a run is saved."""

    every_samples: int | None = None
    """Save after so many samples; None means after each evaluation."""
    keep_last: int = 2
    """Checkpoints kept beside the best one."""
    resized_tables: ResizedTables = "refuse"
    """When a run goes on with tables of another number of rows, with new ones or without some: refuse, or keep the
    rows that both have. New rows start as those of a new run, rows beyond the end are dropped."""

    def __post_init__(self) -> None:
        _at_least(1, self.keep_last, "--checkpoint.keep-last")
        if self.every_samples is not None:
            _at_least(1, self.every_samples, "--checkpoint.every-samples")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Checks that stop a run which cannot come to anything."""

    chance_evaluations: int = 3
    """Stop after so many evaluations in a row that are no better than chance: an AUC of .5, or of sequences, the recall
    of random items or the same items for everybody; 0 turns the check off."""
    constant_prediction: bool = True
    """Stop when every sample gets the same prediction, or of sequences, half of all items the same score."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks; nothing here has a say in what is learned but rounding."""

    sharding: Literal["auto", "table_wise", "column_wise", "row_wise", "table_row_wise", "grid", "replicated"] = "auto"
    """How every table is cut over the ranks; auto plans by bytes, bandwidths and the data's statistics, and cuts tables
    of sequences by rows."""
    tables: tuple[str, ...] = ()
    """Tables with a sharding of their own, as NAME=KIND ..."""
    replicate_below_rows: int = 2048
    """auto: every rank holds the whole of a table with fewer rows than this."""
    exchange: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type in which rows and their gradients travel between ranks."""
    memory: str | None = None
    """Memory per rank that tables may take, as 80GB; None means what the machine has."""
    hang_timeout_seconds: float = 600.0
    """Stop when a rank makes no progress for so long, and name the rank and what it was doing."""

    def __post_init__(self) -> None:
        _at_least(0, self.replicate_below_rows, "--parallel.replicate-below-rows")
        if not self.hang_timeout_seconds > 0:
            raise ValueError(
                f"--parallel.hang-timeout-seconds: expected a number above 0, got {self.hang_timeout_seconds}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A run of the loop, whatever the model."""

    epochs: float = 1.0
    """Passes over the training split."""
    scale_from: int | None = None
    """The batch size that all numbers were chosen for; they are scaled by --rule to that of the run, and printed."""
    rule: RuleName | None = None
    """How (with --scale-from; auto if not given), and how rates follow a batch size that changes during the run."""
    rule_power: float = 0.5
    """Of --rule power."""
    rules: tuple[str, ...] = ()
    """Groups with a rule of their own, as GROUP=RULE ...; dense, head, tables and small_tables."""
    match: Literal["epochs", "updates"] = "epochs"
    """With --scale-from: train on as many samples as before, or on k times as many and so for as many updates."""
    branch_from: Path | None = None
    """A run that this one branches off from, with all its weights, states and progress: for other schedules' ends."""
    branch_at: int | None = None
    """Branch off where that run was last saved after at most so many samples; None is its last checkpoint."""
    time_limit_seconds: float | None = None
    """Stop, evaluate and save after so much training time."""
    shuffle: bool = True
    """Draw a new order of the training rows for every epoch; otherwise the order of time."""
    seed: int = 0
    """Of shuffling and dropout, and in recipes of the initial weights."""
    log_every_samples: int = 65536
    """Write the loss to metrics.jsonl and TensorBoard after so many samples."""
    dense: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    dense_schedule: Schedule = field(default_factory=Schedule)
    """Of the dense part's learning rate."""
    head_schedule: Schedule = field(default_factory=Schedule)
    """Multiplies that of the dense part for the head, the last layer before the logit."""
    tables_schedule: Schedule = field(default_factory=Schedule)
    """Of the tables' learning rates."""
    small_tables_schedule: Schedule = field(default_factory=Schedule)
    """Multiplies that of the tables for small ones."""
    plateau: PlateauConfig = field(default_factory=PlateauConfig)
    curvature_rate: CurvatureRateConfig = field(default_factory=CurvatureRateConfig)
    step: StepConfig = field(default_factory=StepConfig)
    growth: BatchGrowthConfig = field(default_factory=BatchGrowthConfig)
    noise_scale: NoiseScaleConfig = field(default_factory=NoiseScaleConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def staged_batches(self) -> tuple[tuple[int, int], ...]:
        """(from sample, samples per step) of the stages of schedules; empty without them."""
        schedules = (self.dense_schedule, self.head_schedule, self.tables_schedule, self.small_tables_schedule)
        return max(schedule.batch_sizes for schedule in schedules)

    @property
    def rows_are_rare(self) -> bool | None:
        """Whether no row of the tables occurs in most batches; None where only the data can tell."""
        return None

    def __post_init__(self) -> None:
        self._check_stages()
        self._check_growth()
        if not self.epochs > 0:
            raise ValueError(f"--epochs: expected a number above 0, got {self.epochs}")
        self.head.resolve(self.dense)
        parse_rules(self.rules)
        if self.scale_from is not None:
            _at_least(1, self.scale_from, "--scale-from")
        elif self._rule_needs_base() or self.match != "epochs":
            rule = f"--rules {' '.join(self.rules)}" if self.rules else f"--rule {self.rule}"
            given = f"--match {self.match}" if self.match != "epochs" else rule
            raise ValueError(f"--scale-from: expected beside {given} the batch size that the numbers are for, got none")
        if self.branch_at is not None and self.branch_from is None:
            raise ValueError(f"--branch-from: expected a run beside --branch-at {self.branch_at}, got none")
        _at_least(0, self.seed, "--seed")
        _at_least(1, self.log_every_samples, "--log-every-samples")

    def _rule_needs_base(self) -> bool:
        """Whether there is a rule that nothing would follow: only rates of a batch that changes do without a base."""
        has_rule = self.rule is not None or bool(parse_rules(self.rules))
        return self.rule == "adascale" or (has_rule and not self.growth.is_on)

    def _check_growth(self) -> None:
        self.growth.check_used(is_staged=bool(self.staged_batches))
        if not self.growth.instead_of_decay:
            return
        flag, rule = "--growth.instead-of-decay", self.rule or " ".join(self.rules) or "none"
        if rule == "adascale" or (rule != "none" and self.scale_from is None):
            raise ValueError(f"{flag}: expected no --rule beside it, as it sets rates itself, got {rule}")
        if not (self.dense_schedule.decay_samples or self.dense_schedule.shape):
            raise ValueError(f"{flag}: expected a --dense-schedule that decays, got a constant one")

    def _check_stages(self) -> None:
        sizes = self.staged_batches
        if not sizes:
            return
        first, given = sizes[0][1], self.step.global_batch_size
        if first != given:
            raise ValueError(f"--step.global-batch-size: expected {first}, the schedule's first stage, got {given}")
        if self.rule == "adascale":
            raise ValueError(
                "--rule: expected none beside stages(...) of a schedule, which say all rates, got adascale"
            )
        if self.growth.is_on:
            raise ValueError("--growth: expected no growth beside stages(...) of a schedule, which say all batch sizes")
        schedules = (self.dense_schedule, self.head_schedule, self.tables_schedule, self.small_tables_schedule)
        if any(schedule.batch_sizes not in ((), sizes) for schedule in schedules):
            raise ValueError("--dense-schedule.shape: expected the batch sizes of one stages(...), got several")


@dataclass(frozen=True, kw_only=True)
class PlacedConfig(TrainingConfig):
    """A run of the command line: where its data are and its results go, and in how many processes it trains."""

    data: Path | None = None
    """A prepared dataset, or raw files, which are then prepared once."""
    output: Path | None = None
    """The run's folder; if it holds an unfinished run, that run goes on. None makes a new one under runs/."""
    ranks: int | None = None
    """Train in so many processes on this machine; None means one, or as many as torchrun has started."""
    max_restarts: int = 3
    """With --ranks: start all again from the last checkpoint so many times when one is lost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None:
            _at_least(1, self.ranks, "--ranks")
        _at_least(0, self.max_restarts, "--max-restarts")


@dataclass(frozen=True, kw_only=True)
class RunConfig(PlacedConfig):
    """A recipe: data, a DLRM, and how it is trained."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tables: TablesConfig = field(default_factory=TablesConfig)
    small_tables: SmallTablesConfig = field(default_factory=SmallTablesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.small_tables.resolve(self.tables)
        if self.small_tables_schedule != Schedule() and not self.small_tables.below_rows:
            raise ValueError("--small-tables-schedule: expected --small-tables.below-rows beside it, got none")


def _at_least(least: int, number: int, flag: str) -> None:
    if number < least:
        raise ValueError(f"{flag}: expected at least {least}, got {number}")

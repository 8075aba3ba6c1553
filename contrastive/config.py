"""Everything a run on sequences can be told, beside what every run is told; free of torch, as all configuration is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from typing_extensions import override

from contrastive.click_settings import check_no_click_settings
from contrastive.data.sequence_schema import SequenceSchema
from contrastive.encoders.encoder_config import ATTENTION_KINDS, INITIAL_STD, EncoderConfig
from contrastive.mclrec_config import MclrecConfig
from dlrm.config import EvaluationConfig, PlacedConfig, StepConfig
from dlrm.noise.config import NoiseScaleConfig
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.tables_config import TablesConfig

RankingMetric = Literal["mrr_10", "ndcg_10", "ndcg_20", "recall_10", "recall_20"]
SecondView = Literal["augmented", "same_target"]
OPERATORS = ("crop", "mask", "reorder")


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """What a batch of sequences is."""

    max_length: int = 50
    """Actions of a history that are kept, the latest ones."""
    negatives: int | None = None
    """Items drawn for each batch, which the softmax is over; None takes all, as is best where they fit."""
    negatives_power: float = 0.0
    """Items are drawn in proportion to (occurrences in training + 1) to this power: 0 draws all alike."""
    in_batch_negatives: bool = True
    """Next items of a batch's other samples are negatives beside the drawn ones; with none drawn, by themselves."""
    skip_unseen: bool = False
    """Leave items that training never saw out of the histories to rank and to recommend from: their rows are what they
    were at first. The latest one stays where there is no other."""
    operators: tuple[str, ...] = OPERATORS
    """What makes augmented histories, two different ones for each: crop, mask, reorder, and package.module:name of an
    operator of yours (see `contrastive.augment.operators.Augmentation`), a function or a class made without arguments;
    none leaves histories as they are."""
    crop: float = 0.5
    """Share of a history that crop takes away."""
    mask: float = 0.5
    """Share of a history that mask hides."""
    reorder: float = 0.8
    """Share of a history that reorder shuffles."""
    second_view: SecondView = "augmented"
    """augmented: both views are augmented histories of the sample; same_target: the second is another history with the
    same next item (DuoRec)."""

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"--sequence.max-length: expected at least 1, got {self.max_length}")
        self._check_negatives()
        for name in ("crop", "mask"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--sequence.{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.reorder <= 1:
            raise ValueError(f"--sequence.reorder: expected a share in [0, 1], got {self.reorder}")
        for name in self.operators:
            if name not in OPERATORS and ":" not in name:
                expected = f"{', '.join(OPERATORS)} or package.module:name"
                raise ValueError(f"--sequence.operators: expected {expected}, got '{name}'")

    def _check_negatives(self) -> None:
        if not 0 <= self.negatives_power <= 2:
            raise ValueError(f"--sequence.negatives-power: expected 0 to 2, got {self.negatives_power}")
        if self.negatives is None:
            unused = {"negatives-power": self.negatives_power, "no-in-batch-negatives": not self.in_batch_negatives}
            for flag in (name for name, is_given in unused.items() if is_given):
                raise ValueError(f"--sequence.{flag}: expected --sequence.negatives beside it, got a softmax over all")
        elif self.negatives < 0:
            raise ValueError(f"--sequence.negatives: expected at least 0, or None, got {self.negatives}")
        elif not self.negatives and not self.in_batch_negatives:
            raise ValueError("--sequence.negatives: expected at least 1 without those of the batch, got 0")


@dataclass(frozen=True, kw_only=True)
class RankingEvaluationConfig(EvaluationConfig):
    """When the model is measured, on what, and what follows from it."""

    batch_size: int = 512
    """Users ranked at a time; has no influence on the result."""
    metric: RankingMetric = "mrr_10"  # type: ignore[assignment]  # of rankings instead of clicks
    """Decides which checkpoint is the best one."""
    patience: int | None = 10
    """Stop at the first evaluation beyond so many in a row without a better metric, as MCLRec's published code does."""
    filter_seen: bool = False
    """Rank only items that the user has not acted on. It changes every number: compare only alike."""
    skip_unseen_targets: bool = False
    """Measure only samples whose next item training saw; it changes every number, too."""

    @override
    def is_out_of_patience(self, evaluations_without_gain: int) -> bool:
        return self.patience is not None and evaluations_without_gain > self.patience


@dataclass(frozen=True, kw_only=True)
class SequenceRunConfig(PlacedConfig):
    """A recipe for sequences: data, an encoder, what is contrasted, and how it is trained."""

    epochs: float = 100.0
    """Passes over the training split."""
    dim: int = 64
    """Length of an item's vector, and of a history's."""
    schema: SequenceSchema = field(default_factory=SequenceSchema)
    """Of the files that --data names, where they are not prepared yet."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    mclrec: MclrecConfig = field(default_factory=MclrecConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    tables: TablesConfig = field(
        default_factory=lambda: TablesConfig(
            optimizer="adam", learning_rate=1e-3, init_scale=round(INITIAL_STD * math.sqrt(3), 6)
        )
    )
    """Of items and of what is known about them; rows start uniform, with the deviation of the encoder's weights."""
    dense: DenseOptimizerConfig = field(default_factory=lambda: DenseOptimizerConfig(name="adam", learning_rate=1e-3))
    dense_schedule: Schedule = field(default_factory=Schedule)
    """Of the encoder's and the augmenters' learning rate."""
    step: StepConfig = field(default_factory=lambda: StepConfig(global_batch_size=256, device="cpu"))
    noise_scale: NoiseScaleConfig = field(default_factory=lambda: NoiseScaleConfig(every_steps=0))
    evaluation: RankingEvaluationConfig = field(default_factory=RankingEvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim < 1:
            raise ValueError(f"--dim: expected at least 1, got {self.dim}")
        check_no_click_settings(self)
        if self.step.compile:
            raise ValueError("--step.compile: expected none, as each batch is of another shape; leave it out")
        if self.mclrec.second_order:
            self._settle_second_order()
        if self.step.device == "auto":  # what it means here
            object.__setattr__(self, "step", replace(self.step, device="cpu"))

    def _settle_second_order(self) -> None:
        if (self.ranks or 1) > 1:
            raise ValueError(f"--mclrec.second-order: expected one process, got --ranks {self.ranks}; leave one out")
        if self.encoder.kind in ATTENTION_KINDS:  # what "auto" means here
            object.__setattr__(self, "encoder", replace(self.encoder, kernels="torch"))

    @property
    @override
    def rows_are_rare(self) -> bool | None:
        return False if self.sequence.negatives is None else None

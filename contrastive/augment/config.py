"""Which views are made of histories, as settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contrastive.augment.operators import Augmentation, Crop, Mask, Reorder

Operator = Literal["crop", "mask", "reorder"]


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Two views of each history, for models which contrast them."""

    operators: tuple[Operator, ...] = ("crop", "mask", "reorder")
    """Of which two different ones are drawn for each sample; none leaves histories as they are, in both views."""
    crop: float = 0.5
    """Share of a history that a crop cuts away."""
    mask: float = 0.5
    """Share of a history that is hidden."""
    reorder: float = 0.8
    """Share of a history that is shuffled."""
    same_target: bool = False
    """Take as second view the history of another training sample with the same next item (DuoRec)."""

    def __post_init__(self) -> None:
        for name, most in (("crop", 1.0), ("mask", 1.0), ("reorder", None)):
            ratio = getattr(self, name)
            if not 0 < ratio <= 1 or ratio == most:
                bound = "< 1" if most else "<= 1"
                raise ValueError(f"--augment.{name}: expected a share > 0 and {bound}, got {ratio}")
        if len(set(self.operators)) < len(self.operators):
            raise ValueError(f"--augment.operators: expected each once, got {' '.join(self.operators)}")

    def build(self) -> tuple[Augmentation, ...]:
        """Return the operators, for `SequenceReader`."""
        built: dict[Operator, Augmentation] = {
            "crop": Crop(self.crop),
            "mask": Mask(self.mask),
            "reorder": Reorder(self.reorder),
        }
        return tuple(built[name] for name in self.operators)

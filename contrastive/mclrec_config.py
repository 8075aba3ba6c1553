"""What a user says about contrast in training; free of torch so that the command line stays quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ContrastKind = Literal["augmenters", "views", "memory", "none"]
Form = Literal["three_step", "two_step", "joint"]
Regulariser = Literal["code", "paper", "none"]
Stage = Literal["encoder", "augmenters", "joint"]

_STAGES: dict[Form, tuple[Stage, ...]] = {
    "three_step": ("encoder", "augmenters", "encoder"),
    "two_step": ("encoder", "augmenters"),
    "joint": ("joint",),
}


@dataclass(frozen=True, kw_only=True)
class MclrecConfig:
    """The loss besides that of the next item, and who learns from it when.

    Defaults are those of MCLRec's published code on Amazon Beauty. A contrast is the mean of its two directions, as in
    the code; the paper writes their sum, which is twice as much.

    Raises:
        ValueError: Naming the flag, for a number out of range and for settings that do not go together.
    """

    contrast: ContrastKind = "augmenters"
    """What is contrasted: augmented histories and what augmenters make of them (MCLRec); views, augmented histories
    alone (CL4SRec, and DuoRec with same-target views); memory, these with earlier batches' too; none (SASRec)."""
    form: Form = "three_step"
    """Of augmenters: encoder, augmenters, encoder on each batch (the published code); encoder, augmenters (the paper);
    joint is one step of both."""
    views_weight: float = 0.0
    """Weight of the contrast between augmented histories; lambda of the paper."""
    beta: float = 0.05
    """Weight of the contrast with what augmenters make of them."""
    temperature: float = 1.0
    """Divides similarities of augmented histories; those with augmenters have none."""
    similarity: Literal["dot", "cosine"] = "dot"
    """How augmented histories are compared."""
    regulariser: Regulariser = "code"
    """Keeps views from parting: margins for each vector on three pairs (code), for the batch on one pair (paper)."""
    regulariser_weight: float = 0.1
    """Of the regulariser, beside a contrast of weight 1."""
    augmenter_widths: tuple[int, ...] = (32, 16)
    """Hidden layers of an augmenter."""
    shared: bool = False
    """One augmenter for both views."""
    second_order: bool = False
    """Augmenters learn through the encoder's next step, rather than with the encoder as it is. One process only, no
    parameter servers. Takes `--encoder.kernels torch`; an encoder of yours must have second derivatives."""
    virtual_rate: float = 1e-3
    """Learning rate of that step, which is plain gradient descent."""
    memory_size: int = 4096
    """Vectors of earlier batches that a cross-batch memory holds."""

    def __post_init__(self) -> None:
        for name in ("views_weight", "beta", "regulariser_weight"):
            _check(0 <= getattr(self, name) < math.inf, name, "a number >= 0", getattr(self, name))
        for name in ("temperature", "virtual_rate"):
            _check(0 < getattr(self, name) < math.inf, name, "a number above 0", getattr(self, name))
        for width in self.augmenter_widths:
            _check(width >= 1, "augmenter_widths", "at least 1", width)
        if self.contrast in ("views", "memory"):
            expected = f"a number above 0 beside --mclrec.contrast {self.contrast}"
            _check(self.views_weight > 0, "views_weight", expected, self.views_weight)
        if self.contrast == "memory":
            _check(self.memory_size >= 4, "memory_size", "at least 4", self.memory_size)
        if self.second_order:
            has_augmenters = self.contrast == "augmenters"
            _check(has_augmenters, "second_order", "--mclrec.contrast augmenters beside it", self.contrast)
            has_own_step = "augmenters" in self.stages
            _check(has_own_step, "second_order", "--mclrec.form three_step or two_step beside it", self.form)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is done on each batch, in order; the same augmented histories in all, dropout drawn anew."""
        return _STAGES[self.form] if self.contrast == "augmenters" else ("encoder",)

    @property
    def needs_views(self) -> bool:
        """Whether batches are to bring augmented histories."""
        return self.contrast != "none"

    @property
    def needs_own_contrast(self) -> bool:
        """Whether augmented histories are contrasted by themselves."""
        return self.needs_views and self.views_weight > 0


def _check(is_right: bool, name: str, expected: str, got: object) -> None:
    if not is_right:
        flag = name.replace("_", "-")
        raise ValueError(f"--mclrec.{flag}: expected {expected}, got {got}")

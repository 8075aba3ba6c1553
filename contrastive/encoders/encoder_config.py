"""What an encoder of sequences can be told. Nothing here imports torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Positions = Literal["oldest", "newest"]
EncoderKernels = Literal["auto", "torch"]

ATTENTION_KINDS = ("sasrec", "bsarec")
INITIAL_STD = 0.02
"""Deviation of all weights at first, but biases and norms."""
KINDS = (*ATTENTION_KINDS, "gru4rec")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder of sequences: its kind, its size, and how much it forgets in training."""

    kind: str = "sasrec"
    """`sasrec`, `bsarec`, `gru4rec`, or `package.module:Class`, made with (config, dim, max_length)."""
    layers: int = 2
    """Layers, one upon the other."""
    heads: int = 2
    """Heads of attention; they divide the length of a row. Published BSARec has 1 on Beauty."""
    inner: int = 256
    """Width inside a layer's feed-forward network."""
    dropout: float = 0.5
    """Share of hidden numbers that is zeroed in training."""
    attention_dropout: float = 0.5
    """Share of attention that is zeroed in training."""
    positions: Positions | None = None
    """Whether position 0 is that of the `oldest` item, or the last position that of the `newest`, so that a position
    says how long ago; unset is as published: `oldest` for sasrec, `newest` for bsarec."""
    alpha: float = 0.7
    """BSARec: weight of the frequency filter, beside 1 - alpha of attention."""
    cutoff: int = 5
    """BSARec: c of the paper; the cutoff // 2 + 1 lowest frequencies pass unscaled."""
    gru_width: int = 128
    """GRU4Rec: width of the recurrent state."""
    kernels: EncoderKernels = "auto"
    """`auto` takes compiled kernels on the CPU in float32; `torch` takes torch's operators everywhere, slower, but with
    second derivatives, and is what `auto` means beside --mclrec.second-order."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS and ":" not in self.kind:
            raise ValueError(
                f"--encoder.kind: expected one of {', '.join(KINDS)} or package.module:Class, got '{self.kind}'"
            )
        for name in ("layers", "heads", "inner", "cutoff", "gru_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"--encoder.{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"--encoder.{name.replace('_', '-')}: expected a share in [0, 1), got {getattr(self, name)}"
                )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"--encoder.alpha: expected a weight in [0, 1], got {self.alpha}")

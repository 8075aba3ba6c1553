"""The recommenders of sequences that are compared: their flags, and the settings that validation chooses among."""

from __future__ import annotations

from dataclasses import dataclass

Flags = tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """A recommender as the command line names it.

    Attributes:
        recipe: of `recforge train`.
        flags: that make it of the recipe.
        settings: flags to choose among.
    """

    recipe: str
    flags: Flags
    settings: tuple[Flags, ...]


def _each(flag: str, *values: float) -> tuple[Flags, ...]:
    return tuple((flag, str(value)) for value in values)


_BSAREC = ("--encoder.kind", "bsarec", "--encoder.heads", "1")
_AUGMENTERS = ("--mclrec.contrast", "augmenters", "--mclrec.views-weight", "0")
_AS_IT_IS = ("--sequence.crop", "0", "--sequence.mask", "0", "--sequence.reorder", "0")
_TWO_STEPS = ("--mclrec.form", "two_step")  # one update of the encoder a batch, as all others have

METHODS = {
    "sasrec": Method("sasrec", (), _each("--encoder.dropout", 0.5, 0.4, 0.3)),
    "bsarec": Method(
        "bsarec",
        ("--encoder.heads", "1"),
        (
            ("--encoder.alpha", "0.7", "--encoder.cutoff", "5"),
            ("--encoder.alpha", "0.7", "--encoder.cutoff", "3"),
            ("--encoder.alpha", "0.5", "--encoder.cutoff", "5"),
        ),
    ),
    "cl4srec": Method("cl4srec", (), _each("--mclrec.views-weight", 0.1, 0.03, 0.01)),
    "duorec": Method(
        "cl4srec",
        (*_AS_IT_IS, "--sequence.second-view", "same_target"),
        _each("--mclrec.views-weight", 0.1, 0.03, 0.01),
    ),
    "mclrec": Method("mclrec", _AUGMENTERS, _each("--mclrec.beta", 0.05, 0.02, 0.1)),
    "mclrec-two-step": Method("mclrec", _AUGMENTERS + _TWO_STEPS, _each("--mclrec.beta", 0.05, 0.02, 0.1)),
    "mclrec-bsarec": Method("mclrec", _AUGMENTERS + _BSAREC, _each("--mclrec.beta", 0.05, 0.02, 0.1)),
}


def schedule(samples: int, end: float) -> Flags:
    """Return the flags of a schedule that all methods share: constant rates, then half a cosine down to `end`.

    Rates that fell all along left MCLRec on Beauty behind constant ones, and methods on Toys at the beginning.
    """
    fall = samples // 5
    shape = f"cosine({fall}, start={samples - fall}, end={end})"
    return "--dense-schedule.shape", shape, "--tables-schedule.shape", shape

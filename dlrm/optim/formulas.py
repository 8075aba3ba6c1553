"""What learning-rate formulas have in common: a factor for every number of samples, checked numbers, products, texts.

A formula is an immutable value without a state of its own: two of them never meddle with each other, and going back in
a run, as a resumed one does, finds the factors of the first time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, get_type_hints

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What a number of a formula stands for: its least value, whether that is allowed, and what scales with it."""

    words: str
    least: float
    may_be_least: bool = True
    is_length: bool = False
    is_warmup: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is a number of this kind."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return value > self.least or (self.may_be_least and value == self.least)


Length: TypeAlias = Annotated[
    float, Quantity(words="a number of samples > 0", least=0, may_be_least=False, is_length=True)
]
Position: TypeAlias = Annotated[float, Quantity(words="a number of samples >= 0", least=0, is_length=True)]
Warmup: TypeAlias = Annotated[
    float, Quantity(words="a number of samples >= 0", least=0, is_length=True, is_warmup=True)
]
Shift: TypeAlias = Annotated[float, Quantity(words="a number of samples", least=-math.inf, is_length=True)]
Size: TypeAlias = Annotated[float, Quantity(words="a factor >= 0", least=0)]
Positive: TypeAlias = Annotated[float, Quantity(words="a number > 0", least=0, may_be_least=False)]


@dataclass(frozen=True)
class Formula(ABC):
    """A factor on a learning rate as a pure function of samples seen; `a * b` multiplies two of them.

    `str` of a formula is its text, see `schedule_text`.

    Raises:
        ValueError: naming the formula and its argument, for a number out of range.
    """

    name: ClassVar[str] = ""
    quantities: ClassVar[dict[str, Quantity]] = {}  # what its numbers stand for

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        notes = {argument: getattr(hint, "__metadata__", (None,))[0] for argument, hint in hints.items()}
        cls.quantities = {argument: note for argument, note in notes.items() if isinstance(note, Quantity)}

    def __post_init__(self) -> None:
        for argument, quantity in self.quantities.items():
            self._check(argument, quantity.holds(getattr(self, argument)), quantity.words)

    @property
    def warmup_samples(self) -> float:
        """Samples after which the warm-up that a run begins with is over."""
        return max((getattr(self, name) for name, kind in self.quantities.items() if kind.is_warmup), default=0.0)

    @property
    def batch_sizes(self) -> tuple[tuple[int, int], ...]:
        """(from sample, samples per step) of stages that have batch sizes of their own; empty without them."""
        return ()

    @abstractmethod
    def factor(self, samples: float) -> float:
        """Return the factor, >= 0, once ``samples`` (>= 0) have been seen."""

    def stretch(self, lengths: float, warmups: float = 1.0) -> Self:
        """Return the formula with everything that is counted in samples multiplied.

        Args:
            lengths: by which.
            warmups: multiplies, besides, the lengths of warm-ups.
        """
        kinds = {argument: kind for argument, kind in self.quantities.items() if kind.is_length}
        factors = {argument: lengths * (warmups if kind.is_warmup else 1.0) for argument, kind in kinds.items()}
        return replace(self, **{argument: getattr(self, argument) * factor for argument, factor in factors.items()})

    def __mul__(self, other: Formula | float) -> Product:
        return Product((self, as_formula(other)))

    def __rmul__(self, other: float) -> Product:
        return Product((as_formula(other), self))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self._arguments())})"

    def _arguments(self) -> Iterator[str]:
        for index, item in enumerate(fields(self)):
            value = getattr(self, item.name)
            if item.default is MISSING or value != item.default:
                yield (f"{item.name}=" if index else "") + text_of(value)

    def _check(self, argument: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{self.name}({argument}): expected {expected}, got {text_of(getattr(self, argument))}")


@dataclass(frozen=True)
class Constant(Formula):
    """The same factor everywhere; in a text, the number alone says it too."""

    name: ClassVar[str] = "constant"

    value: Size

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        return float(self.value)


@dataclass(frozen=True)
class Product(Formula):
    """All factors multiplied."""

    name: ClassVar[str] = "product"

    parts: tuple[Formula, ...]

    def __post_init__(self) -> None:
        flat = [inner for part in self.parts for inner in (part.parts if isinstance(part, Product) else (part,))]
        object.__setattr__(self, "parts", tuple(flat))
        if len({part.batch_sizes for part in self.parts} - {()}) > 1:
            raise ValueError(f"expected the batch sizes of one stages(...), got several in {self}")

    @property
    def batch_sizes(self) -> tuple[tuple[int, int], ...]:
        """See `Formula`."""
        return max(part.batch_sizes for part in self.parts)

    @property
    def warmup_samples(self) -> float:
        """See `Formula`."""
        return max(part.warmup_samples for part in self.parts)

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        return math.prod(part.factor(samples) for part in self.parts)

    def stretch(self, lengths: float, warmups: float = 1.0) -> Self:
        """See `Formula`."""
        return replace(self, parts=tuple(part.stretch(lengths, warmups) for part in self.parts))

    def __str__(self) -> str:
        return " * ".join(map(str, self.parts))


@dataclass(frozen=True)
class Piecewise(Formula):
    """One formula after the other, each from a sample on; each begins at its own 0 samples there.

    Attributes:
        pieces: (from sample, formula); the first from sample 0.
    """

    name: ClassVar[str] = "piecewise"

    pieces: tuple[tuple[float, Formula], ...]

    def __post_init__(self) -> None:
        pairs = is_list(self.pieces, lambda piece: is_list(piece) and len(piece) == 2)
        pairs = pairs and all(isinstance(formula, Formula) for _, formula in self.pieces)
        self._check("pieces", pairs, "(0, FORMULA), (SAMPLES, FORMULA), ...")
        starts = [start for start, _ in self.pieces]
        rises = is_rising(starts) and starts[0] == 0 and len(set(starts)) == len(starts)
        self._check("pieces", rises, "first samples that begin with 0 and rise")
        staged = any(formula.batch_sizes for _, formula in self.pieces)
        self._check("pieces", not staged, "formulas without stages(...), which have pieces of their own")
        object.__setattr__(self, "pieces", tuple((start, formula) for start, formula in self.pieces))

    @property
    def warmup_samples(self) -> float:
        """See `Formula`."""
        return self.pieces[0][1].warmup_samples

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        start, formula = self.pieces[bisect_right(self.pieces, samples, key=lambda piece: piece[0]) - 1]
        return formula.factor(samples - start)

    def stretch(self, lengths: float, warmups: float = 1.0) -> Self:
        """See `Formula`."""
        stretched = ((start * lengths, formula.stretch(lengths, warmups)) for start, formula in self.pieces)
        return replace(self, pieces=tuple(stretched))

    def _arguments(self) -> Iterator[str]:
        return map(text_of, self.pieces)


def as_formula(value: Formula | float) -> Formula:
    """Return a formula as it is, and a number as a constant."""
    return value if isinstance(value, Formula) else Constant(value)


def is_list(value: object, fits: Callable[[Any], bool] = lambda item: item is not None) -> bool:
    """Whether a value is a list or tuple of at least one item, all of which fit."""
    return isinstance(value, tuple | list) and bool(value) and all(map(fits, value))


def is_rising(samples: Sequence[Any]) -> bool:
    """Whether all are numbers of samples, none lower than the one before it."""
    numbers = all(isinstance(number, int | float) and 0 <= number < math.inf for number in samples)
    return numbers and list(samples) == sorted(samples)


def text_of(value: Any) -> str:
    """Return a value as it stands in the text of a formula."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(text_of, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):_}"
    return repr(value)

"""From the names of operators to the operators."""

from __future__ import annotations

import pkgutil

from contrastive.augment.operators import Augmentation, Crop, Mask, Reorder
from contrastive.config import SequenceConfig


def build_operators(config: SequenceConfig) -> tuple[Augmentation, ...]:
    """Build the operators that a run draws its views by.

    Args:
        config: their names, and the shares of those that are ours.

    Raises:
        ValueError: a name is of nothing that can be called, or of a class that cannot be made.
    """
    ours: dict[str, Augmentation] = {
        "crop": Crop(config.crop),
        "mask": Mask(config.mask),
        "reorder": Reorder(config.reorder),
    }
    return tuple(ours[name] if name in ours else _find(name) for name in config.operators)


def _find(name: str) -> Augmentation:
    expected = "--sequence.operators: expected package.module:name of a function, or of a class made without arguments"
    try:
        found = pkgutil.resolve_name(name)
        operator: Augmentation = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{expected}, got '{name}': {error}") from error
    if not callable(operator):
        raise ValueError(f"{expected}, got '{name}', which cannot be called")
    return operator

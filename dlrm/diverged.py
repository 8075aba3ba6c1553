"""One type for whatever shows that a run has diverged, so that who trains many runs can tell it from a mistake."""

from __future__ import annotations


class DivergedError(ValueError):
    """A run came to nothing: its loss, weights or predictions are no numbers, or its rates are not accepted."""

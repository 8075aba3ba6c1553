"""What every encoder of sequences is: a module that maps the vectors of histories' items to one vector per history."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Encoder(Protocol):
    """A module whose `forward` has this form; `EncoderConfig.kind` may name one of yours."""

    def __call__(self, vectors: Tensor, lengths: Tensor, hidden: Tensor) -> Tensor:
        """Return the histories' vectors [B, dim], in the order given.

        Args:
            vectors: [T, dim], rows of all histories' items, one history after the other, without padding and without
                positions. The row of PAD stands where an item is hidden.
            lengths: [B] int64, items of each history, from 1 to the longest that the encoder was built for.
            hidden: [T] bool, true where an item is hidden.
        """
        ...

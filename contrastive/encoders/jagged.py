"""Where the tokens of histories lie while they are encoded: one after the other, or by buckets of like length.

Linear layers do not care which tokens belong together; attention does. Compiled kernels walk along each history, so
there tokens stay where they are, without padding. Batched products need rectangles: histories are sorted by length and
cut into buckets, each padded to its longest. Padding comes after a history's last item, where causal attention never
looks, so it repeats that item and needs no mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contrastive.encoders.encoder_config import Positions

Integers = NDArray[np.int64]

# Padding tokens which cost as much as one more bucket: measured on one core, guessed for a GPU, where a bucket's dozens
# of small operators are launched in the time of many tokens. 256 histories of Amazon Beauty, some 2,100 tokens, get 12
# buckets (1.07 slots a token) on a core and 3 (1.9) on a GPU; padded to the longest they would have 5.9.
_BUCKET_TOKENS = {"cpu": 24, "cuda": 1024}


@dataclass(frozen=True)
class Bucket:
    """Histories that are padded to one width.

    Attributes:
        count: number of histories, b.
        width: slots of each, w.
        last: [b] int64, slot of each history's last item, from its first slot.
        hidden: [b, w] bool; None where nothing is hidden.
        unmasked: [b] bool, histories with nothing but hidden items; None where nothing is hidden.
    """

    count: int
    width: int
    last: Tensor
    hidden: Tensor | None
    unmasked: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Where the tokens of B histories lie in S slots.

    Attributes:
        sources: [S] int64, token whose vector is in each slot; None where slot and token are the same.
        positions: [S] int64, position of each slot.
        last: [B] int64, slot of the last item of each history, in the histories' order here.
        order: [B] int64, where the vector of each history given lies among those here; None for the same order.
        starts: [B + 1] int64, first slot of each history here, and S; in the CPU's memory, as numpy has it.
        unmasked: [B] bool, histories here with nothing but hidden items; in the CPU's memory.
        hidden: [S] bool; None where nothing is hidden.
        real: [S] bool, false where a slot is padding; None without any padding.
        buckets: histories here from the first to the last; None where they are not padded.
    """

    sources: Tensor | None
    positions: Tensor
    last: Tensor
    order: Tensor | None
    starts: Integers
    unmasked: NDArray[np.bool_]
    hidden: Tensor | None
    real: Tensor | None
    buckets: tuple[Bucket, ...] | None


def lay_out(
    lengths: Tensor, hidden: Tensor, max_length: int, *, positions: Positions = "oldest", padded: bool = True
) -> Layout:
    """Plan where tokens lie.

    A history with nothing but hidden items is encoded as the published code does, where the mask of -1e4 on all keys
    cancels out: without a mask, over all `max_length` positions, each with PAD's row.

    Args:
        lengths: [B] int64, items of each history.
        hidden: [T] bool, hidden items.
        max_length: longest history allowed, and number of positions.
        positions: which end of a history they are counted from.
        padded: whether to sort histories into buckets.

    Raises:
        ValueError: a length is out of range, or the lengths do not add up to T.
    """
    counts = lengths.cpu().numpy()
    check_lengths(counts, len(hidden), max_length)
    first = np.cumsum(counts) - counts
    shown = hidden.cpu().numpy() if bool(hidden.any()) else None
    unmasked = np.zeros(len(counts), bool) if shown is None else np.logical_and.reduceat(shown, first)
    extents = np.where(unmasked, max_length, counts)
    order = np.argsort(extents, kind="stable") if padded else None
    if order is not None:
        counts, first, extents, unmasked = counts[order], first[order], extents[order], unmasked[order]
    groups = _group(extents, _BUCKET_TOKENS.get(lengths.device.type, 0)) if padded else None
    widths = extents if groups is None else np.repeat([w for _, w in groups], [b for b, _ in groups])
    starts = np.concatenate([[0], np.cumsum(widths)])
    steps = np.arange(starts[-1]) - np.repeat(starts[:-1], widths)
    # Tokens of a history without any shown item are all alike, so that repeating its last one fills all positions.
    ends = np.repeat(counts - 1, widths)
    sources = np.repeat(first, widths) + np.minimum(steps, ends) if padded or unmasked.any() else None
    real = steps < np.repeat(extents, widths) if padded and len(steps) > extents.sum() else None
    last, placed = counts - 1, steps
    if positions == "newest":
        last = np.where(unmasked, max_length - 1, last)
        # Padding's positions are anybody's guess, but must be positions.
        placed = np.minimum(steps + np.repeat(max_length - extents, widths), max_length - 1)
    there = lengths.device
    hidden_slots = shown if sources is None or shown is None else shown[sources]
    layout_hidden = None if hidden_slots is None else _tensor(hidden_slots, there)
    return Layout(
        sources=None if sources is None else _tensor(sources, there),
        positions=_tensor(placed, there),
        last=_tensor(starts[:-1] + last, there),
        order=None if order is None else _tensor(np.argsort(order), there),
        starts=starts,
        unmasked=unmasked,
        hidden=layout_hidden,
        real=None if real is None else _tensor(real, there),
        buckets=None if groups is None else _fill_buckets(groups, last, unmasked, layout_hidden, there),
    )


def check_lengths(counts: Integers, tokens: int, max_length: int) -> None:
    """Raise ValueError unless all histories have 1 to `max_length` items, `tokens` in all."""
    if counts.size == 0 or counts.min() < 1 or counts.max() > max_length:
        got = f"{counts.min()} to {counts.max()}" if counts.size else "no history"
        raise ValueError(
            f"encoder: expected histories of 1 to {max_length} items, got {got}; readers cut to --sequence.max-length"
        )
    if counts.sum() != tokens:
        raise ValueError(f"encoder: expected {counts.sum()} items, the sum of the histories' lengths, got {tokens}")


def _group(extents: Integers, bucket_tokens: int) -> list[tuple[int, int]]:
    """Cut histories, sorted by extent, into (count, width); none holds more padding than another one would cost."""
    groups: list[tuple[int, int]] = []
    width = count = padding = 0
    values, counts = np.unique(extents, return_counts=True)
    for extent, number in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        padding += number * (width - extent)
        if count and padding > bucket_tokens:
            groups.append((count, width))
            count = 0
        if not count:
            width, padding = extent, 0
        count += number
    groups.append((count, width))
    return groups[::-1]


def _fill_buckets(
    groups: list[tuple[int, int]],
    last: Integers,
    unmasked: NDArray[np.bool_],
    hidden: Tensor | None,
    device: torch.device,
) -> tuple[Bucket, ...]:
    buckets: list[Bucket] = []
    history = slot = 0
    for count, width in groups:
        histories, slots = slice(history, history + count), slice(slot, slot + count * width)
        buckets.append(
            Bucket(
                count=count,
                width=width,
                last=_tensor(last[histories], device),
                hidden=None if hidden is None else hidden[slots].view(count, width),
                unmasked=None if hidden is None else _tensor(unmasked[histories], device),
            )
        )
        history, slot = histories.stop, slots.stop
    return tuple(buckets)


def _tensor(array: NDArray[np.int64] | NDArray[np.bool_], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

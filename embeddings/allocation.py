"""Tells the C library which freed memory to keep for the next training step, and when to hand back the rest."""

from __future__ import annotations

import ctypes
import sys
import time

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER = 2**31 - 1
_LARGEST_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Makes this process keep what it frees, up to 1 GiB apiece, instead of handing it back to the system.

    A step allocates and frees the same large tensors over and over. Depending on how they come to lie, glibc hands
    them back each time and every page of them has to be mapped and zeroed again: with 4,096 samples x 26 features x
    64 numbers 13,800 page faults, 20 to 40 of 140 ms. Call it once, before the first step; it holds for the whole
    process, whose memory then stays at its peak, or grows beyond it where sizes differ: see `FreeMemory`.

    Returns:
        Whether the C library understood: on Linux with glibc.
    """
    return _set_allocator((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, _NEVER))


def share_free_memory() -> bool:
    """Makes all threads allocate from one arena, so that what one has freed serves the others.

    glibc gives each of many threads an arena of its own, each with holes of its own: a shard with a dozen threads grew
    by some MiB a minute for half an hour. Call it before there are threads; they then wait for one another's
    allocations, which Python's lock makes them do anyway.

    Returns:
        Whether the C library understood: on Linux with glibc.
    """
    return _set_allocator((_M_ARENA_MAX, 1))


def _set_allocator(*settings: tuple[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)


class FreeMemory:
    """What a process that lasts has freed, wherever it lies: handed back to the system every so often.

    A shard that copies its rows for snapshots and moves, and a trainer of histories of all lengths, leave holes of all
    sizes, and glibc keeps all but those at the end: a trainer held 2.7 GB after ten minutes, of which it used .2.
    Handing them back takes milliseconds for some hundred MiB, and what is needed again is mapped again, page by page:
    twice a minute does. Nothing happens but on Linux with glibc.

    Args:
        every_seconds: between two hand-backs.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        self._every_seconds = every_seconds
        self._last = time.monotonic()

    def tend(self) -> None:
        """Hand it back if it is time to; call it as often as you like."""
        if time.monotonic() - self._last >= self._every_seconds:
            _hand_back()
            self._last = time.monotonic()


def _hand_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)

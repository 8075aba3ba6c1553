"""Tells the C library to keep the memory of a training step for the next one."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER = 2**31 - 1
_LARGEST_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Makes this process keep what it frees, up to 1 GiB apiece, instead of handing it back to the system.

    A step allocates and frees the same large tensors over and over. Depending on how they come to lie, glibc hands
    them back each time and every page of them has to be mapped and zeroed again: with 4,096 samples x 26 features x
    64 numbers 13,800 page faults, 20 to 40 of 140 ms. Call it once, before the first step; it holds for the whole
    process, whose memory then stays at its peak.

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


def hand_back_memory() -> bool:
    """Hands back to the system what this process has freed, wherever it lies.

    A process that lasts, and copies what it holds every so often, leaves holes of all sizes; glibc keeps all but those
    at the end. Milliseconds for some hundred MiB: once or twice a minute does.

    Returns:
        Whether the C library understood: on Linux with glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is None:
        return False
    trim(0)
    return True

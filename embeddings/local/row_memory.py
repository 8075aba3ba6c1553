"""Memory for rows: on huge pages, and beginning at the start of a cache line.

Rows lie at random places of far more memory than a processor knows the addresses of by heart: with pages of 4 KiB it
looks a page up for nearly each row, and a row of 256 bytes that begins within a cache line lies in five instead of
four. Together they made a lookup of 26 tables of 100,000 rows x 64 one and a half times as fast.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:  # processes that hold rows and compute nothing start without it
    import torch
    from torch import Tensor

_HUGE_PAGE_BYTES = 1 << 21
_SMALLEST_BYTES = 1 << 22  # below, what rounding up to whole pages costs is no small part
_CACHE_LINE_BYTES = 64


def zero_rows(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Makes a tensor of zeros on the CPU; see ``zero_array``.

    Args:
        shape: Of the tensor.
        dtype: By default float32.
    """
    import torch

    dtype = dtype or torch.float32
    return torch.from_numpy(_zero_bytes(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)


def zero_array(*shape: int, dtype: DTypeLike = np.float32) -> NDArray[np.generic]:
    """Makes an array of zeros, of pages that are there only once they are touched.

    Whether the system has huge pages to give is its own affair: on Linux its setting ``transparent_hugepage`` must be
    ``madvise`` or ``always``.
    """
    return _zero_bytes(math.prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)


def _zero_bytes(num_bytes: int) -> NDArray[np.uint8]:
    if num_bytes < _SMALLEST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        flat, unit = np.zeros(num_bytes + _CACHE_LINE_BYTES, np.uint8), _CACHE_LINE_BYTES
    else:
        # Private, since pages that processes may share are huge only where another setting says so.
        pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _ask_for_huge_pages(pages)
        flat, unit = np.frombuffer(pages, np.uint8), _HUGE_PAGE_BYTES  # holds on to the pages
    start = -flat.ctypes.data % unit
    return flat[start : start + num_bytes]


def _ask_for_huge_pages(pages: mmap.mmap) -> None:
    # An error means a kernel that was built without them.
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)

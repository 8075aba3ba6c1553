"""How kernels are compiled: without the interpreter's lock, once per machine, with the arithmetic as written."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a function at its first call; products and sums may be fused, and nothing else reordered.

    NaN and infinity keep their meaning: the guards look for them. Numba's own threads are not used, see ``threads``.
    """
    return _compile(function, {"contract"})


def inlined(function: Callable[..., Any]) -> Any:
    """Compiles a part of an inner loop into the kernel that calls it: a call hands over dozens of numbers."""
    return numba.njit(inline="always", nogil=True, error_model="numpy", fastmath={"contract"})(function)


def unfused(function: Callable[..., Any]) -> Any:
    """Compiles a function whose numbers are, bit for bit, those of numpy: a product and a sum stay two roundings."""
    return _compile(function, set())


def reordering(function: Callable[..., Any]) -> Any:
    """Compiles a sum whose order does not matter, which lets it be vectorised.

    Only for a loop that sums: elsewhere it would draw a division into a loop.
    """
    return _compile(function, {"contract", "reassoc", "nsz"})


def _compile(function: Callable[..., Any], fast_math: set[str]) -> Any:
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fast_math}
    try:
        # Signatures are left to the first call: listing them would load every kernel at import.
        kernel = numba.njit(cache=True, **settings)(function)
    except RuntimeError:
        # Neither the package's folder nor the user's can be written to: compiled anew in each process.
        return numba.njit(**settings)(function)
    # Numba compiles a kernel anew when its own file has changed, but not when that of a kernel has that it calls: the
    # old one would live on inside its callers, and nothing would say so.
    saved = kernel._cache._cache_file
    saved._source_stamp = (saved._source_stamp, _digest_sources())
    return kernel


@cache
def _digest_sources() -> str:
    digest = blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

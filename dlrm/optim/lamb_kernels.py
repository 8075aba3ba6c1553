"""LAMB's two passes over float32 layers on a CPU, compiled by Numba: each number is read as rarely as it can be.

torch's multi-tensor operations pass over the layers a dozen times. Here the first pass advances the moments, writes
the direction and measures norms, block by block in the nearest cache; the second one moves the weights. All layers go
in one call, as addresses: with a call per layer, a small network's step would mostly be calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from dlrm.optim.lamb_operations import Layer
from embeddings.kernels.compiled import compiled
from embeddings.kernels.threads import run_all
from embeddings.kernels.vectors import LANES, divide, load, multiply_add, splat, square_root, store, total

Longs = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]

BLOCK = 1024  # numbers of a layer that are summed in float32; such sums are added in float64
PIECE = 64 * BLOCK  # most that a thread takes at once
_PLAIN = (Tensor, Parameter)  # others, as distributed ones, may have no memory of their own

WEIGHT, GRADIENT, MEAN, SQUARE, STEP = range(5)  # columns of addresses
RATE = 0  # column of settings


class KernelMoves:
    """Does as `OperationMoves`, for layers that `suit_kernels`.

    Args:
        layers: to move.
        divisor: of all gradients, a scalar; None leaves them.

    Attributes:
        squares: ||w||^2 and ||u||^2, [layers, 2] in float64; zeros for layers that do not adapt.
    """

    def __init__(self, layers: Sequence[Layer], divisor: Tensor | None) -> None:
        self._weights = [layer.weight for layer in layers]
        sizes = tuple([weight.numel() for weight in self._weights])
        # One tensor for all directions, which is given back at once.
        self._directions = torch.empty(sum(sizes))
        self._starts, self._pieces = _cut(sizes)
        # Flat lists: numpy takes far longer over nested ones.
        addresses = [tensor.data_ptr() for layer in layers for tensor in layer[1:6]]
        self._addresses = np.array(addresses, np.int64).reshape(-1, 5)
        self._settings, self._places = _list_settings(layers)
        count_steps(self._addresses)
        scale = 1.0 if divisor is None else 1.0 / float(divisor)
        self._measured = np.zeros((len(self._pieces), 2))
        is_narrow = np.array([layer.mean.dtype is torch.bfloat16 for layer in layers])
        self._run(partial(find_directions, self._settings, self._places, is_narrow, scale))
        squares = np.zeros((len(layers), 2))
        add_pieces(self._pieces, self._measured, squares)
        self.squares = torch.from_numpy(squares)

    def find_ratios(self, squares: Tensor) -> Tensor:
        """Return the layers' ratios, [layers] in float64."""
        ratios = np.empty(len(squares))
        find_ratios(squares.numpy(), self._settings, self._places, ratios)
        return torch.from_numpy(ratios)

    def finish(self, ratios: Tensor) -> None:
        """Move every weight by its direction times its ratio and its group's rate; ratios are [layers]."""
        self._run(partial(move_weights, self._settings[self._places, RATE] * ratios.numpy()))
        increment_version(self._weights)  # else a backward pass would not notice that what it has kept is changed

    def _run(self, kernel: Any) -> None:
        pieces = self._pieces
        common = self._addresses, self._starts, self._directions.data_ptr()
        threads = min(torch.get_num_threads(), len(pieces)) if self._directions.numel() > 2 * PIECE else 1
        if threads == 1:
            kernel(*common, pieces, self._measured)
            return
        ends = np.linspace(0, len(pieces), 4 * threads + 1, dtype=np.int64)
        parts = [(pieces[a:b], self._measured[a:b]) for a, b in pairwise(ends) if a < b]
        run_all([partial(kernel, *common, *part) for part in parts])


def suit_kernels(layers: Sequence[Layer]) -> bool:
    """Say whether all of the layers' tensors are contiguous float32 on the CPU; first moments may be bfloat16.

    Weights and gradients may not be negated lazily, as the imaginary part of a conjugate is, whose memory holds the
    other sign. Moments never are: an optimizer makes its own.
    """
    float32, narrow = torch.float32, (torch.float32, torch.bfloat16)
    for _, weight, gradient, mean, square, *_ in layers:
        if not (
            weight.dtype is gradient.dtype is square.dtype is float32
            and mean.dtype in narrow
            and weight.is_cpu
            and gradient.is_cpu
            and mean.is_cpu
            and weight.is_contiguous()
            and gradient.is_contiguous()
            and mean.is_contiguous()
            and square.is_contiguous()
            and type(weight) in _PLAIN
            and not (weight.is_neg() or gradient.is_neg())
        ):
            return False
    return True


def _list_settings(layers: Sequence[Layer]) -> tuple[Doubles, Longs]:
    """Return all different settings, and of each layer the place of its own."""
    places: dict[tuple[int, float, bool], int] = {}
    numbers: list[tuple[float, ...]] = []
    of_layers = []
    for group, *_, decay, adapts in layers:
        key = id(group), decay, adapts
        if key not in places:
            places[key] = len(places)
            bounds, most = group["norm_bounds"] or (0.0, np.inf), 1.0 if group["trust_clip"] else np.inf
            moments = *group["betas"], group["eps"], group["bias_correction"]
            numbers.append((group["lr"], *moments, *bounds, most, decay, adapts))
        of_layers.append(places[key])
    return np.array(numbers, np.float64), np.array(of_layers, np.int64)


@lru_cache(maxsize=8)
def _cut(sizes: tuple[int, ...]) -> tuple[Longs, Longs]:
    """Return where layers' directions start, and pieces of layers: of each its layer, start and end."""
    pieces = [(i, a, min(a + PIECE, size)) for i, size in enumerate(sizes) for a in range(0, size, PIECE)]
    return np.cumsum((0, *sizes))[:-1], np.array(pieces, np.int64).reshape(-1, 3)


def _point(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


point: Any = intrinsic(_point)


@compiled
def count_steps(addresses: Longs) -> None:
    """Add one to each layer's count of steps."""
    for i in range(len(addresses)):
        carray(point(addresses[i, STEP]), 1, np.float32)[0] += np.float32(1)


@compiled
def find_directions(
    settings: Doubles,
    places: Longs,
    is_narrow: Bools,
    gradient_scale: float,
    addresses: Longs,
    starts: Longs,
    directions: int,
    pieces: Longs,
    measured: Doubles,
) -> None:
    """First pass over some pieces, whose ||w||^2 and ||u||^2 it writes."""
    wide = np.empty(BLOCK, np.uint32)
    for p in range(len(pieces)):
        layer, start, end = pieces[p]
        at = addresses[layer]
        step = carray(point(at[STEP]), 1, np.float32)[0]
        _, beta1, beta2, eps, corrects, _, _, _, decay, adapts = settings[places[layer]]
        correction1 = 1 - beta1**step if corrects else 1.0
        correction2 = 1 - beta2**step if corrects else 1.0
        # (m/c1) / (sqrt(v/c2) + eps) = m / (sqrt(v) * c1/sqrt(c2) + eps*c1)
        numbers = (
            np.float32(gradient_scale),
            np.float32(beta1),
            np.float32(1 - beta1),
            np.float32(beta2),
            np.float32(1 - beta2),
            np.float32(correction1 / np.sqrt(correction2)),
            np.float32(eps * correction1),
            np.float32(decay),
        )
        for begin in range(start, end, BLOCK):
            size = min(BLOCK, end - begin)
            w = carray(point(at[WEIGHT] + 4 * begin), size, np.float32)
            g = carray(point(at[GRADIENT] + 4 * begin), size, np.float32)
            v = carray(point(at[SQUARE] + 4 * begin), size, np.float32)
            u = carray(point(directions + 4 * (starts[layer] + begin)), size, np.float32)
            if is_narrow[layer]:
                narrow = carray(point(at[MEAN] + 2 * begin), size, np.uint16)
                widen(narrow, wide[:size])
                squares = find_direction(w, g, wide[:size].view(np.float32), v, u, numbers)
                shorten(wide[:size], narrow)
            else:
                m = carray(point(at[MEAN] + 4 * begin), size, np.float32)
                squares = find_direction(w, g, m, v, u, numbers)
            if adapts:
                measured[p, 0] += squares[0]
                measured[p, 1] += squares[1]


@compiled
def find_direction(w: Floats, g: Floats, m: Floats, v: Floats, u: Floats, numbers: Any) -> Any:
    """Advance the moments of a block, write its direction, and return its ||w||^2 and ||u||^2."""
    scale, beta1, rest1, beta2, rest2, enlarge, eps, decay = numbers
    zeros = weight_sums = direction_sums = splat(np.float32(0))
    scales, betas1, rests1, betas2, rests2 = splat(scale), splat(beta1), splat(rest1), splat(beta2), splat(rest2)
    enlarges, epses, decays = splat(enlarge), splat(eps), splat(decay)
    whole = w.size // LANES * LANES
    for d in range(0, whole, LANES):
        gradient, weight = multiply_add(scales, load(g, d), zeros), load(w, d)
        mean = multiply_add(rests1, gradient, multiply_add(betas1, load(m, d), zeros))
        square = multiply_add(multiply_add(rests2, gradient, zeros), gradient, multiply_add(betas2, load(v, d), zeros))
        direction = divide(mean, multiply_add(square_root(square), enlarges, epses))
        direction = multiply_add(decays, weight, direction)
        store(m, d, mean)
        store(v, d, square)
        store(u, d, direction)
        weight_sums = multiply_add(weight, weight, weight_sums)
        direction_sums = multiply_add(direction, direction, direction_sums)
    weight_sum, direction_sum = total(weight_sums), total(direction_sums)
    for d in range(whole, w.size):
        number = scale * g[d]
        m[d] = beta1 * m[d] + rest1 * number
        v[d] = beta2 * v[d] + rest2 * number * number
        u[d] = m[d] / (np.sqrt(v[d]) * enlarge + eps) + decay * w[d]
        weight_sum += w[d] * w[d]
        direction_sum += u[d] * u[d]
    return weight_sum, direction_sum


@compiled
def widen(narrow: Any, wide: Any) -> None:
    """Write the bits of bfloat16 numbers as those of float32 ones."""
    for d in range(narrow.size):
        wide[d] = np.uint32(narrow[d]) << np.uint32(16)


@compiled
def shorten(wide: Any, narrow: Any) -> None:
    """Write the bits of float32 numbers as those of the nearest bfloat16 ones, of two the even one; NaN stays NaN."""
    for d in range(narrow.size):
        high = wide[d] >> np.uint32(16)
        nearest = (wide[d] + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
        is_nan = (wide[d] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        # Rounding would carry a NaN's bits into the exponent or the sign, or leave those of an infinity.
        narrow[d] = np.uint16(high | np.uint32(0x40)) if is_nan else np.uint16(nearest)


@compiled
def add_pieces(pieces: Longs, measured: Doubles, squares: Doubles) -> None:
    """Add what was measured of pieces to their layers' squares."""
    for p in range(len(pieces)):
        for column in range(squares.shape[1]):
            squares[pieces[p, 0], column] += measured[p, column]


@compiled
def find_ratios(squares: Doubles, settings: Doubles, places: Longs, ratios: Doubles) -> None:
    """Write what `trust_ratios` says."""
    for i in range(len(ratios)):
        _, _, _, _, _, least, most, most_ratio, _, _ = settings[places[i]]
        ratio = 1.0
        if squares[i, 0] > 0 and squares[i, 1] > 0:
            ratio = min(max(np.sqrt(squares[i, 0]), least), most) / np.sqrt(squares[i, 1])
        ratios[i] = min(ratio, most_ratio)


@compiled
def move_weights(
    factors: Doubles, addresses: Longs, starts: Longs, directions: int, pieces: Longs, measured: Doubles
) -> None:
    """Second pass over some pieces: directions times factors are subtracted."""
    for p in range(len(pieces)):
        layer, start, end = pieces[p]
        at = addresses[layer]
        w = carray(point(at[WEIGHT] + 4 * start), end - start, np.float32)
        u = carray(point(directions + 4 * (starts[layer] + start)), end - start, np.float32)
        subtract(w, u, np.float32(factors[layer]))


@compiled
def subtract(w: Floats, u: Floats, factor: Any) -> None:
    """Move a piece."""
    for d in range(w.size):
        w[d] -= factor * u[d]

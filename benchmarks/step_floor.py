"""What one step of the click network must cost whatever the code: its matrix products, and moving its rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.click_networks import BATCH_SIZE, BOTTOM, DIM, NUM_NUMERIC, NUM_TABLES, TOP

_NUMBER_BYTES = 4
COPIED_BYTES = 256 << 20  # far more than a cache holds


def build_products() -> Callable[[int], None]:
    """Build what multiplies as the MLPs do: outputs, weights' gradients, inputs' gradients but the first layer's."""
    vectors = NUM_TABLES + 1
    widths = [[NUM_NUMERIC, *BOTTOM], [DIM + vectors * (vectors - 1) // 2, *TOP]]
    products: list[tuple[Tensor, Tensor, Tensor]] = []
    for fan_in, fan_out in itertools.chain.from_iterable(map(itertools.pairwise, widths)):
        inputs, weight = torch.randn(BATCH_SIZE, fan_in), torch.randn(fan_out, fan_in)
        outputs = torch.randn(BATCH_SIZE, fan_out)
        products += [(inputs, weight.T, outputs.clone()), (outputs.T, inputs, weight.clone())]
        if fan_in != NUM_NUMERIC:
            products.append((outputs, weight, inputs.clone()))

    def multiply(_: int) -> None:
        for left, right, out in products:
            torch.mm(left, right, out=out)

    return multiply


def build_copy() -> Callable[[int], None]:
    """Build what copies ``COPIED_BYTES``: it reads and it writes as many."""
    source = torch.zeros(COPIED_BYTES // _NUMBER_BYTES)
    target = torch.zeros_like(source)

    def copy(_: int) -> None:
        target.copy_(source)

    return copy


def moved_bytes(ids_per_step: int) -> int:
    """Count what must be read and written once, weights and activations of the MLPs aside.

    The lookup reads the rows and writes the pooled vectors. The interaction reads these in forward and again in
    backward, where it writes their gradient. The update reads that, and reads and writes each row once (ids of a batch
    are uniform, so that hardly any repeats), with its optimizer's state.
    """
    vector_bytes = DIM * _NUMBER_BYTES
    pooled_bytes = BATCH_SIZE * NUM_TABLES * vector_bytes
    row_bytes = ids_per_step * vector_bytes
    return (
        (row_bytes + pooled_bytes)
        + 3 * pooled_bytes
        + (pooled_bytes + 2 * row_bytes)
        + 2 * ids_per_step * _NUMBER_BYTES
    )

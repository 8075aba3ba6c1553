"""Looks for NaN and infinities in a state before it is saved: a checkpoint of them could not be continued."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from dlrm.checkpoints.pieces import name_piece
from dlrm.checkpoints.state_tree import FlatState

CHUNK = 32_768  # torch works on so few elements in the calling thread; on more, also on the trainer's cores


def check_finite(state: FlatState) -> None:
    """Look for NaN and infinities in every tensor, in the calling thread alone.

    Raises:
        ValueError: naming the first such tensor, and the row in it.
    """
    whole = {
        (group, name_piece(name, piece.first, piece.shape, tensor.shape)): (name, piece.first)
        for group, parts in state.parts.items()
        for name, tensor in parts.items()
        for piece in tensor.pieces
    }
    for group, tensors in state.tensors.items():
        for key, tensor in tensors.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            at = _first_nonfinite(tensor)
            if at is None:
                continue
            name, first = whole.get((group, key), (key, (0,)))
            _refuse(f"{group}/{name}", tensor, at, first[0] if first else 0)


def check_block(name: str, block: Tensor, first: int) -> None:
    """Check a tensor's rows from `first` on.

    Raises:
        ValueError: as `check_finite`.
    """
    at = _first_nonfinite(block)
    if at is not None:
        _refuse(name, block, at, first)


def _refuse(name: str, tensor: Tensor, at: int, first: int) -> NoReturn:
    value = tensor.reshape(-1)[at].item()
    row = f" in row {first + at // math.prod(tensor.shape[1:])}" if tensor.ndim else ""
    raise ValueError(f"expected finite values in {name}, got {value}{row}; lower the learning rate")


def _first_nonfinite(tensor: Tensor) -> int | None:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK]
        numbers = torch.view_as_real(chunk) if chunk.is_complex() else chunk
        if numbers.itemsize == 1:  # 8-bit floats know no minimum
            numbers = numbers.float()
        lowest, highest = torch.aminmax(numbers)
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            finite = torch.isfinite(chunk.float() if chunk.itemsize == 1 else chunk)
            return start + int((~finite).nonzero()[0])
    return None

"""Takes a nested state apart into named tensors and a skeleton of plain JSON, and puts the two together again exactly.

JSON alone would turn a tuple into a list and the key 0 into "0", and knows neither NaN nor tensors; pickle would run
whatever code a file tells it to. In the skeleton, lists and scalars are what they are, and one-key objects the rest:
`{"dict": [[key, value], ...]}`, `{"tuple": [...]}`, `{"float": "nan"}` and `{"tensor": [group, name]}`. A group whose
tensors lie in pieces over ranks is `{"parts": group}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dlrm.checkpoints.pieces import PartedTensor, Parts, name_piece

RESERVED = "__metadata__"  # the one name that a safetensors file keeps for itself


@dataclass
class FlatState:
    """A state taken apart.

    Attributes:
        skeleton: what JSON can hold, with references to tensors.
        tensors: group (the state's top-level key) -> name (the keys below it, joined by "/") -> tensor.
        parts: group -> its parted tensors; the pieces at hand are among `tensors`, under the names of `name_piece`.
        far: group -> pieces that other processes hold, under the same names.
    """

    skeleton: Any = None
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    parts: dict[str, Parts] = field(default_factory=dict)
    far: dict[str, Parts] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        far = [tensor for parts in self.far.values() for tensor in parts.values()]
        near = sum(tensor.nbytes for named in self.tensors.values() for tensor in named.values())
        return near + sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in far)


def flatten(state: Mapping[str, object]) -> FlatState:
    """Take a state apart; the tensors are those of the state, not copies.

    Args:
        state: nested dict, list and tuple of dense tensors, str, int, float, bool and None; keys are str or int.
            A top-level value may be `Parts`.

    Raises:
        ValueError: it holds something else, whose place is named.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state: expected a dict, got {type(state).__name__}")
    flat = FlatState()
    for key, value in state.items():
        if isinstance(value, Parts):
            flat.parts[key] = value
            flat.tensors[key] = {}
            for name, tensor in value.items():
                for piece in tensor.pieces:
                    its_name = name_piece(name, piece.first, piece.shape, tensor.shape)
                    if piece.far is not None:
                        alone = replace(piece, first=(0,) * len(piece.shape))
                        far = PartedTensor(shape=piece.shape, dtype=tensor.dtype, pieces=(alone,))
                        flat.far.setdefault(key, Parts())[its_name] = far
                    else:
                        flat.tensors[key][its_name] = piece.whole().detach()
    flat.skeleton = _take_apart(state, (), flat.tensors)
    return flat


def unflatten(
    skeleton: Any, find_tensor: Callable[[str, str], Tensor], find_parts: Callable[[str], Parts] | None = None
) -> Any:
    """Put a state together again from its skeleton, `find_tensor(group, name)` and `find_parts(group)`."""
    if isinstance(skeleton, list):
        return [unflatten(item, find_tensor, find_parts) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return find_tensor(*content)
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(unflatten(item, find_tensor, find_parts) for item in content)
    if kind == "parts" and find_parts is not None:
        return find_parts(content)
    return {key: unflatten(item, find_tensor, find_parts) for key, item in content}


def _take_apart(value: object, path: tuple[str, ...], tensors: dict[str, dict[str, Tensor]]) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(_add_tensor(value, path, tensors))}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Parts) and len(path) == 1:
        return {"parts": path[0]}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise ValueError(f"state {_place(path)}: expected keys that are str or int, got {key!r}")
        return {"dict": [[key, _take_apart(item, (*path, str(key)), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_take_apart(item, (*path, str(index)), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise ValueError(
        f"state {_place(path)}: expected tensor, dict, list, tuple, str, int, float, bool or None, "
        f"got {type(value).__name__}; turn arrays into tensors"
    )


def _add_tensor(tensor: Tensor, path: tuple[str, ...], tensors: dict[str, dict[str, Tensor]]) -> tuple[str, str]:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = f"{tensor.layout} on {tensor.device}"
        raise ValueError(f"state {_place(path)}: expected a dense tensor with data, got {kind}")
    group = tensors.setdefault(path[0], {})
    wanted = name = "/".join(path[1:]) or path[0]
    attempt = 1
    # {"a/b": x} and {"a": {"b": y}}, or the keys 1 and "1", meet in one name.
    while name in group or name == RESERVED:
        attempt += 1
        name = f"{wanted}~{attempt}"
    group[name] = tensor.detach()
    return path[0], name


def _place(path: tuple[str, ...]) -> str:
    return repr("/".join(path))

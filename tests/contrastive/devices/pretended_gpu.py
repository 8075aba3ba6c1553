"""A device that computes on the CPU and keeps its tensors apart, as a GPU does: who forgets to move one fails.

It stands in for a GPU where there is none. It registers a device with torch, which stays for as long as the process
does and which torch then takes for its accelerator: use it in a process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_BY_INDICES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # of which a GPU takes a CPU's


@contextlib.contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Have such a device, in this thread, until the end of the block."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    with torch.autograd.set_multithreading_enabled(False), _Dispatch():
        yield torch.device(NAME, 0)


class _Module(_DummyBackendModule):
    """What `torch.pretended` is."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Say what autocast may shorten to."""
        return [torch.bfloat16]


class PretendedTensor(Tensor):
    """A tensor of the device, around one of the CPU that nobody else holds."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{function}: a tensor of the pretended GPU has left its thread")

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse, as a tensor of a GPU does."""
        raise TypeError("can't convert a tensor of the pretended GPU to numpy; use .cpu() first")


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        is_there = any(isinstance(tensor, PretendedTensor) for tensor in tensors)
        if is_there:
            _check_together(function, tensors)
        if function is torch.ops.aten.copy_.default:
            is_there = isinstance(args[0], PretendedTensor)
        asked = dict(given)
        if asked.get("device") is not None:
            is_there = torch.device(asked["device"]).type == NAME
            asked["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map_only(PretendedTensor, lambda tensor: tensor.inner, (args, asked))
        out = function(*inner_args, **inner_kwargs)
        if not is_there:
            return out
        return return_and_correct_aliasing(function, args, given, tree_map_only(Tensor, PretendedTensor, out))


def _check_together(function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    if function in _COPIES:
        return
    for tensor in tensors[:1] if function in _BY_INDICES else tensors:
        if not isinstance(tensor, PretendedTensor) and tensor.dim():
            raise RuntimeError(f"{function}: expected all on one device, got a tensor {[*tensor.shape]} on the CPU")

"""What a checkpoint holds of a run beside its progress: rows, dense weights, the optimizer's state and random state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embeddings.interface import Tables


def take_model(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return a model's live tensors in two groups: `dense`, and `tables` with `<table>.weight` and so on."""
    prefixes, shared = _table_prefixes(model)
    groups: dict[str, dict[str, Tensor]] = {"dense": {}, "tables": {}}
    for key, tensor in model.state_dict().items():
        if key.startswith(prefixes):
            groups["tables"][key.removeprefix(shared)] = tensor
        else:
            groups["dense"][key] = tensor
    return groups


def load_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Set a model's tensors to what `take_model` returned.

    Raises:
        ValueError: the model has other tensors than the one that was saved.
    """
    _, shared = _table_prefixes(model)
    tensors = state["dense"] | {shared + key: tensor for key, tensor in state["tables"].items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"expected a checkpoint of this model, got one of another ({why}); choose another --output"
        ) from None


def seed_generators(seed: int) -> None:
    """Seed every generator that a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (what a model may use)


def take_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator that a model may draw from."""
    _, words, position, has_normal, normal = np.random.get_state()  # noqa: NPY002 (what a model may use)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.array(words, dtype=np.int64)), position, has_normal, normal),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def load_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set the generators to what `take_random_state` returned; a GPU's only if it was saved on one."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    words, *rest = state["numpy"]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _table_prefixes(model: nn.Module) -> tuple[tuple[str, ...], str]:
    """Return how the keys of each set of tables begin, and what to leave out: all of it if there is but one set."""
    names = (name for name, module in model.named_modules() if isinstance(module, Tables))
    prefixes = tuple(f"{name}." if name else "" for name in names)
    return prefixes, prefixes[0] if len(prefixes) == 1 else ""

"""What a checkpoint holds of a run beside its progress: rows, dense weights, the optimizer's state and random state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dlrm.checkpoints.table_state import load_tables, table_prefixes, take_tables
from dlrm.config import ResizedTables


def take_model(model: nn.Module) -> dict[str, Any]:
    """Return a model's live tensors in two groups: `dense`, and the parts `tables` with `<table>.weight` and so on."""
    prefixes = table_prefixes(model)
    dense = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(prefixes)}
    return {"dense": dense, "tables": take_tables(model)}


def load_model(
    model: nn.Module, state: Mapping[str, Any], *, resized_tables: ResizedTables = "refuse"
) -> tuple[str, ...]:
    """Set a model's tensors to what `take_model` returned, of as many ranks and whatever plan.

    Args:
        model: whose tables may lie on other ranks than those of the model that was saved.
        state: what `take_model` returned, or what was restored of it.
        resized_tables: what to do about tables of another number of rows, new ones and gone ones. `keep` takes over
            the rows that both have, and leaves other rows of the model, and their optimizer's state, as they are.

    Returns:
        A line for each table that `keep` has changed.

    Raises:
        ValueError: the model has other tensors than the one that was saved.
    """
    lines = load_tables(model, state["tables"], resized_tables)
    prefixes = table_prefixes(model)
    try:
        missing, unexpected = model.load_state_dict(state["dense"], strict=False)
        wrong = [key for key in (*missing, *unexpected) if not key.startswith(prefixes)]
        if wrong:
            raise RuntimeError(f"one of the two lacks {', '.join(wrong)}")
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"expected a checkpoint of this model, got one of another ({why}); choose another --output"
        ) from None
    return lines


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
    """Set the generators to what `take_random_state` returned; a GPU's only if it was saved on one.

    A rank that had no part in the checkpoint gets `{"rank": ..., "samples": ...}`: its generators start from these and
    the seed that torch's generator was last given.
    """
    if "torch" not in state:
        text = f"{torch.initial_seed()} {state['rank']} {state['samples']}".encode()
        seed_generators(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little"))
        return
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    words, *rest = state["numpy"]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

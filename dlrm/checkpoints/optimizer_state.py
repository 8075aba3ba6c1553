"""Loads the dense optimizer's state into groups that may be others than those it was saved in: by parameters' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Set an optimizer to a saved state.

    Runs were saved once whose groups were two, matrices and vectors, without names.

    Args:
        optimizer: of named parameters.
        saved: as `state_dict` returned it.

    Raises:
        ValueError: it is of other parameters.
    """
    live = optimizer.state_dict()["param_groups"]
    groups = saved["param_groups"]
    if _layout(live) != _layout(groups) and all("param_names" in group for group in (*live, *groups)):
        saved = _regroup(live, saved)
    try:
        optimizer.load_state_dict(dict(saved))
    except (KeyError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"expected a checkpoint of this dense optimizer, got one of another ({why}); choose another --output, or "
            "end that run with the version of recforge that began it"
        ) from None


def _layout(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(group.get("name"), group.get("param_names")) for group in groups]


def _regroup(live: list[dict[str, Any]], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state in the groups that there are now; their options are those their parameters had."""
    former = {name: group for group in saved["param_groups"] for name in group["param_names"]}
    keys = {
        name: key
        for group in saved["param_groups"]
        for name, key in zip(group["param_names"], group["params"], strict=True)
    }
    names = {name for group in live for name in group["param_names"]}
    if differing := sorted(names ^ keys.keys()):
        raise ValueError(
            f"expected a checkpoint of this dense optimizer, got one of other parameters ({', '.join(differing)}); "
            "choose another --output"
        )
    state: dict[int, Any] = {}
    groups = []
    for group in live:
        for name, key in zip(group["param_names"], group["params"], strict=True):
            if keys[name] in saved["state"]:
                state[key] = saved["state"][keys[name]]
        own = {option: group[option] for option in ("name", "params", "param_names") if option in group}
        groups.append({**former[group["param_names"][0]], **own})
    return {**saved, "state": state, "param_groups": groups}

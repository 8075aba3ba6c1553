"""What a run was told: written into its folder, and compared when the run is continued."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlrm.config import TrainingConfig
from dlrm.training.run_log import finite

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.json"
# What a run may be continued with in another form: none of it bends the path that was already taken.
MAY_CHANGE = (
    *("data", "output", "ranks", "max_restarts", "epochs", "time_limit_seconds"),
    *("log_every_samples", "evaluation", "checkpoint", "guards", "parallel"),
)
# What besides, in a run that branches off from another: optimizers' states and batches are taken over as they are.
MAY_BRANCH = (
    *("branch_from", "branch_at", "plateau"),
    *("dense_schedule", "head_schedule", "tables_schedule", "small_tables_schedule"),
)


def describe_run(config: TrainingConfig, model: nn.Module, recipe: str) -> dict[str, Any]:
    """Return everything that decides what a run computes, as JSON has it."""
    from dlrm.training.guards import find_tables  # here, as who only reads configurations needs no torchrec

    network = {
        "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "tables": {table.name: asdict(table) for tables in find_tables(model) for table in tables.table_configs},
    }
    described: dict[str, Any] = {"recipe": recipe, **asdict(config), "network": network}
    return dict(json.loads(json.dumps(finite(described), default=str)))


def check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that `folder` holds no run, or one of these settings.

    With `--checkpoint.resized-tables keep`, tables may have other numbers of rows, be new or be gone.

    Raises:
        ValueError: naming the first setting that differs, and both values.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    former = json.loads(path.read_text(encoding="utf-8"))
    but_sizes = _differences(*_without_sizes(former, settings))
    may_resize = settings.get("checkpoint", {}).get("resized_tables") == "keep"
    for name, (before, now) in (but_sizes if may_resize else _differences(former, settings)).items():
        cure = "choose another --output, or repeat that run's settings to continue it"
        if name not in but_sizes:
            cure += ", or keep the rows that both have with --checkpoint.resized-tables keep"
        raise ValueError(f"{folder} holds a run with {name} = {before}, got {now}; {cure}")


def check_same_path(run: Path, former: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a branch has all settings of the run it leaves, but for what may bend its further path.

    Raises:
        ValueError: naming the first setting that differs, and both values.
    """
    for name, (before, now) in _differences(former, settings).items():
        if name.split(".")[0] not in MAY_BRANCH:
            raise ValueError(
                f"--branch-from: expected the settings of {run} but for schedules, lengths and plateaus, got {name} = "
                f"{now}, there {before}"
            )


def _differences(former: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what may not change and has: dotted name -> both values, None where one has no such setting."""
    before, now = dict(leaves(former)), dict(leaves(settings))
    names = sorted(now.keys() | {name for name in before if name.split(".")[0] in settings})
    return {
        name: (before.get(name), now.get(name))
        for name in names
        if name.split(".")[0] not in MAY_CHANGE and before.get(name) != now.get(name)
    }


def _without_sizes(*runs: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Leave out tables that not all of these settings have, and the numbers of rows."""
    tables = [run.get("network", {}).get("tables", {}) for run in runs]
    common = [name for name in tables[0] if all(name in others for others in tables)]
    return tuple(
        {
            **run,
            "network": {
                **run.get("network", {}),
                "tables": {name: {**own[name], "num_rows": None} for name in common},
            },
        }
        for run, own in zip(runs, tables, strict=True)
    )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of everything in nested mappings that is not a mapping itself."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value

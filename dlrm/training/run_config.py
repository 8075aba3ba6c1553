"""What a run was told: written into its folder, and compared when the run is continued."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from dlrm.config import TrainingConfig
from dlrm.training.guards import find_tables
from dlrm.training.run_log import finite

CONFIG = "config.json"
# What a run may be continued with in another form: none of it bends the path that was already taken.
MAY_CHANGE = (
    *("data", "output", "ranks", "max_restarts", "epochs", "time_limit_seconds"),
    *("log_every_samples", "evaluation", "checkpoint", "guards", "parallel"),
)


def describe_run(config: TrainingConfig, model: nn.Module, recipe: str) -> dict[str, Any]:
    """Return everything that decides what a run computes, as JSON has it."""
    network = {
        "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "tables": {table.name: asdict(table) for tables in find_tables(model) for table in tables.table_configs},
    }
    described: dict[str, Any] = {"recipe": recipe, **asdict(config), "network": network}
    return dict(json.loads(json.dumps(finite(described), default=str)))


def check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that `folder` holds no run, or one of these settings.

    Raises:
        ValueError: naming the first setting that differs, and both values.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    former = dict(leaves(json.loads(path.read_text(encoding="utf-8"))))
    now = dict(leaves(settings))
    for name in sorted(now.keys() | {key for key in former if key.split(".")[0] in settings}):
        if name.split(".")[0] not in MAY_CHANGE and former.get(name) != now.get(name):
            raise ValueError(
                f"{folder} holds a run with {name} = {former.get(name)}, got {now.get(name)}; choose another --output, "
                "or repeat that run's settings to continue it"
            )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of everything in nested mappings that is not a mapping itself."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value

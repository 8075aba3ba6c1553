"""What a run was told: written into its folder, and compared when the run is continued."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlrm.config import RunConfig, TrainingConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.training.run_log import finite
from embeddings import TableConfig

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.json"
# What a run may be continued with in another form: none of it bends the path that was already taken. Other ranks and
# devices draw dropout anew.
MAY_CHANGE = (
    *("data", "output", "ranks", "max_restarts", "epochs", "time_limit_seconds"),
    *("log_every_samples", "evaluation", "checkpoint", "guards", "parallel", "step.threads", "step.device"),
)
# What besides, in a run that branches off from another: optimizers' states and batches are taken over as they are.
SCHEDULES = ("dense_schedule", "head_schedule", "tables_schedule", "small_tables_schedule")
MAY_BRANCH = ("branch_from", "branch_at", "plateau", *SCHEDULES, "servers", "dense_average", "client")


def describe_run(config: TrainingConfig, model: nn.Module, recipe: str) -> dict[str, Any]:
    """Return everything that decides what a run computes, as JSON has it."""
    from dlrm.training.guards import find_tables  # here, as who only reads configurations needs no torchrec

    network = {
        "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "tables": {table.name: asdict(table) for tables in find_tables(model) for table in tables.table_configs},
    }
    return _as_json({"recipe": recipe, **asdict(config), "network": network})


def check_same_run(folder: Path, settings: Mapping[str, Any], kind: type[TrainingConfig] = RunConfig) -> None:
    """Check that `folder` holds no run, or one of these settings.

    With `--checkpoint.resized-tables keep`, tables may have other numbers of rows, be new or be gone.

    Args:
        folder: of the run.
        settings: as `describe_run` gives them.
        kind: of their configuration, whose defaults a run had where it says nothing.

    Raises:
        ValueError: naming the first setting that differs, and both values.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    former = json.loads(path.read_text(encoding="utf-8"))
    sized = _without_sizes(former, settings)
    but_sizes = _differences(sized[0], sized[1], kind)
    may_resize = settings.get("checkpoint", {}).get("resized_tables") == "keep"
    for name, (before, now) in (but_sizes if may_resize else _differences(former, settings, kind)).items():
        cure = "choose another --output, or repeat that run's settings to continue it"
        if name not in but_sizes:
            cure += ", or keep the rows that both have with --checkpoint.resized-tables keep"
        raise ValueError(f"{folder} holds a run with {name} = {before}, got {now}; {cure}")


def check_same_path(
    run: Path, former: Mapping[str, Any], settings: Mapping[str, Any], kind: type[TrainingConfig] = RunConfig
) -> None:
    """Check that a branch has all settings of the run it leaves, but for what may bend its further path.

    Args:
        run: the folder of the run it leaves.
        former: settings of that run.
        settings: of the branch.
        kind: as in `check_same_run`.

    Raises:
        ValueError: naming the first setting that differs, and both values.
    """
    for name, (before, now) in _differences(former, settings, kind).items():
        if name.split(".")[0] not in MAY_BRANCH:
            raise ValueError(
                f"--branch-from: expected the settings of {run} but for schedules, lengths and plateaus, got {name} = "
                f"{now}, there {before}"
            )
    stages, there = _staged_batches(settings), _staged_batches(former)
    if stages != there:
        raise ValueError(
            f"--branch-from: expected the batch sizes of {run}, as batches are taken over, got stages(...) with "
            f"{_describe_stages(stages)}, there {_describe_stages(there)}"
        )


def _staged_batches(settings: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return the batch sizes of the schedules' stages, as `TrainingConfig.staged_batches` does."""
    shapes = [settings.get(name, {}).get("shape", "") for name in SCHEDULES]
    return max(Schedule(shape=shape).batch_sizes for shape in shapes)


def _describe_stages(stages: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{size} from sample {samples}" for samples, size in stages) or "none"


def _differences(
    former: Mapping[str, Any], settings: Mapping[str, Any], kind: type[TrainingConfig]
) -> dict[str, tuple[Any, Any]]:
    """Return what may not change and has: dotted name -> both values, None where one has no such setting.

    A setting that there was not yet when the former run began had what is its default now.
    """
    now = dict(leaves(settings))
    defaults = {name: value for name, value in leaves(_defaults(former, kind)) if name in now}
    before = {**defaults, **dict(leaves(former))}
    for name in now.keys() & before.keys():
        # Optimizers' own numbers were written out once; those that were taken stand in `network`.
        if name.startswith("tables.") and None in (before[name], now[name]):
            before[name] = now[name]
    names = sorted(now.keys() | {name for name in before if name.split(".")[0] in settings})
    return {
        name: (before.get(name), now.get(name))
        for name in names
        if not {name, name.split(".")[0]} & set(MAY_CHANGE) and before.get(name) != now.get(name)
    }


def _defaults(former: Mapping[str, Any], kind: type[TrainingConfig]) -> dict[str, Any]:
    """Return what settings are where nothing is said, of those tables that a run had."""
    table = {item.name: item.default for item in fields(TableConfig) if item.default is not MISSING}
    tables = dict.fromkeys(former.get("network", {}).get("tables", {}), table)
    return _as_json({**asdict(kind()), "network": {"tables": tables}})


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


def _as_json(described: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(finite(described), default=str)))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of everything in nested mappings that is not a mapping itself."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value

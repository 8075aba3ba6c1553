"""Scales each table's rate by how often the data name its rows, where a rule can tell tables apart by that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dlrm.config import RunConfig
from dlrm.optim.scaling import rule_of
from dlrm.optim.scaling_rules import ScaledGroup, rows_are_rare
from dlrm.tables_config import parse_rates


def wants_frequencies(config: RunConfig) -> bool:
    """Whether `rate_tables` may change anything."""
    scaled = config.scale_from is not None and config.scale_from != config.step.global_batch_size
    return scaled and any(rule_of(config, group).name == "auto" for group in ("tables", "small_tables"))


def rate_tables(
    config: RunConfig, num_rows: Mapping[str, int], top_shares: Mapping[str, float]
) -> tuple[RunConfig, list[str]]:
    """Return the configuration with a rate for each table that is not as rare, or as frequent, as its group, and why.

    Args:
        config: as `scale_config` has scaled it, each table as its group.
        num_rows: of each table.
        top_shares: of each table, the share of the samples that name its most frequent row.
    """
    if not wants_frequencies(config):
        return config, []
    size = config.step.global_batch_size
    ratio = size / (config.scale_from or size)
    factors, changed = parse_rates(config.tables.rates), dict[str, list[str]]()
    for name, rows in num_rows.items():
        is_small = rows < config.small_tables.below_rows
        optimizer = (config.small_tables.optimizer if is_small else None) or config.tables.optimizer
        group = ScaledGroup(name="small_tables" if is_small else "tables", optimizer=optimizer)
        known = replace(group, is_rare=rows_are_rare(top_shares[name], size))
        rule = rule_of(config, group.name)
        own, common = (rule.multipliers(ratio, kind).learning_rate for kind in (known, group))
        if own != common:
            factors[name] = factors.get(name, 1.0) * own / common
            how_often = "no row occurs in every batch" if known.is_rare else "some rows occur in every batch"
            changed.setdefault(f"learning rate times {own / common:.4g}, as {how_often}", []).append(name)
    rates = tuple(f"{name}={factor!r}" for name, factor in factors.items())
    lines = [f"{why}: {', '.join(names)}" for why, names in changed.items()]
    return replace(config, tables=replace(config.tables, rates=rates)), lines

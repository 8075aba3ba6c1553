"""`recforge train`: from a recipe's name or a configuration file to a finished run, on one process or many ranks."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import override

from dlrm.config import RunConfig, TrainingConfig
from dlrm.distributed.one_voice import OneVoice
from dlrm.distributed.place import Place
from dlrm.optim.plateau import find_plateau_doubt
from dlrm.optim.scaling import scale_config
from dlrm.optim.scaling_text import describe_changes, find_doubts
from dlrm.optim.table_rates import rate_tables, wants_frequencies
from dlrm.recipes import Recipe, find_recipe, list_recipes
from dlrm.training import kind
from dlrm.training.kind import Kind

if TYPE_CHECKING:
    from dlrm.data.dataset import Dataset
    from dlrm.distributed.process_group import Group
    from dlrm.distributed.ranks import Ranks
    from dlrm.training.problem import Prepared
    from dlrm.training.trainer import Trainer
    from embeddings.shards import ShardingPlan

Config = TypeVar("Config", bound=TrainingConfig)
Clicks = TypeVar("Clicks", bound=RunConfig)


class ClickRuns(Kind):
    """Models of clicks: a DLRM on a prepared log."""

    module = "dlrm"
    config = RunConfig

    @override
    def find(self, name: str) -> Recipe:
        return find_recipe(name)

    @override
    def usage(self) -> str:
        return _usage()

    @override
    def scale(self, config: RunConfig, place: Place) -> RunConfig:
        return scale_to_batch(config, place)

    @override
    def provide(self, recipe: Recipe, config: RunConfig, group: Group) -> Dataset:
        return _provide(recipe, config, group)

    @override
    def build(self, name: str, config: RunConfig, output: Path, data: Dataset, group: Group) -> Trainer:
        from dlrm.training.train_step import choose_device

        if group.ranks.is_first:
            tell_doubts(config, data)
        config = rate_by_frequency(config, data, group.place)
        plan = _plan(config, data, group, choose_device(config.step.device).type)
        return build_trainer(name, config, output, data, plan=plan, ranks=group.ranks)

    @override
    def describe(self, summary: dict[str, Any]) -> str:
        return describe_summary(summary)


CLICKS = ClickRuns()


def run_train(argv: list[str]) -> int:
    """Train what `argv` names: a recipe or a configuration file, then flags."""
    return kind.run(CLICKS, argv)


def train(name: str, recipe: Recipe, config: RunConfig, *, voice: OneVoice | None = None) -> dict[str, Any]:
    """Train a recipe with a configuration; see `dlrm.training.kind.train`."""
    return kind.train(CLICKS, name, recipe, config, voice=voice)


def scale_to_batch(config: Config, place: Place) -> Config:
    """Scale hyperparameters to the batch size if they are to be, and print all of them before and after."""
    scaled, changes = scale_config(config)
    if changes and place.rank == 0:
        print("recforge:", "\n".join(describe_changes(scaled, changes)), file=sys.stderr)
    return scaled


def tell_doubts(config: TrainingConfig, dataset: Prepared) -> None:
    """Print what is unlikely to end well, as far as the data are needed to see it."""
    rows = dataset.rows("train")
    doubts = find_doubts(config, rows) if config.scale_from is not None else []
    plateau = find_plateau_doubt(config.plateau, round(config.epochs * rows), config.evaluation.every_samples or rows)
    for doubt in [*doubts, *([plateau] if plateau else [])]:
        print(f"recforge: warning: {doubt}", file=sys.stderr)


def rate_by_frequency(config: Clicks, dataset: Dataset, place: Place) -> Clicks:
    """Give tables rates by how often the data name their rows, if the rule asks for that."""
    if not wants_frequencies(config):
        return config
    from dlrm.descriptions import describe_tables
    from dlrm.planning.statistics import measure_top_shares

    tables = describe_tables(dataset.info, config.model.dim, config.tables, config.small_tables)
    rated, lines = rate_tables(config, {t.name: t.num_rows for t in tables}, measure_top_shares(dataset, tables))
    for line in lines if place.rank == 0 else ():
        print(f"recforge: {line}", file=sys.stderr)
    return replace(config, tables=rated.tables)


def build_trainer(
    name: str,
    config: RunConfig,
    output: Path,
    dataset: Dataset,
    *,
    plan: ShardingPlan | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """Build the model of a recipe on its device, and its trainer.

    Args:
        name: of the recipe.
        config: of the run, with its numbers already scaled.
        output: the run's folder.
        dataset: prepared.
        plan: where tables lie; of one process, none is needed.
        ranks: who else trains; None is nobody.

    Raises:
        ValueError: see `Trainer`.
    """
    from dlrm.checkpoints.run_state import seed_generators
    from dlrm.distributed.ranks import ALONE
    from dlrm.model import build_dlrm
    from dlrm.training.train_step import choose_device, compile_dense, set_matmul_precision
    from dlrm.training.trainer import Trainer

    ranks = ranks or ALONE
    device = choose_device(config.step.device)
    seed_generators(config.seed)
    model = build_dlrm(
        dataset.info,
        config.model,
        config.tables,
        config.small_tables,
        seed=config.seed,
        device=str(device),
        plan=plan,
        exchange=config.parallel.exchange,
    )
    for note in model.tables.notes if ranks.is_first else ():
        print(f"recforge: {note}", file=sys.stderr)
    set_matmul_precision(config.step.precision)
    if config.step.compile:
        compile_dense(model, device, cuda_graphs=config.step.cuda_graphs)
    return Trainer(model, dataset, config, output, recipe=name, ranks=ranks)


def _provide(recipe: Recipe, config: RunConfig, group: Group) -> Dataset:
    """Prepare the data on rank 0 where they are not yet, and open them on all."""
    from dlrm.data.dataset import DESCRIPTION, Dataset
    from dlrm.data.provide import provide_dataset

    if group.ranks.is_first:
        dataset = provide_dataset(recipe.source, config.data)
        group.store.set("dataset", str(dataset.folder.resolve()))
    else:
        folder = Path(group.wait_for("dataset"))
        # Each may have the data in a place of its own, but only prepared ones.
        dataset = Dataset(config.data if config.data is not None and (config.data / DESCRIPTION).is_file() else folder)
    group.check_alike({"data of the fingerprint": dataset.fingerprint}, "give all ranks the same --data")
    return dataset


def _plan(config: RunConfig, dataset: Dataset, group: Group, device: str) -> ShardingPlan | None:
    from dlrm.descriptions import describe_tables
    from dlrm.training.guards import check_memory

    tables = describe_tables(dataset.info, config.model.dim, config.tables, config.small_tables)
    if group.ranks.count == 1:
        if device == "cpu":
            check_memory(tables)
        return None
    from dlrm.planning.plan_run import limit_memory, memory_for_tables, plan_run, setting_of
    from embeddings.planning.machine import machine_for

    ranks = group.ranks
    there_is = ranks.gather_numbers([memory_for_tables(place, ranks.per_node) for place in (device, "cpu")])
    own, host = (int(min(numbers)) for numbers in zip(*there_is, strict=True))
    setting = setting_of(
        tables,
        config.parallel,
        dataset,
        machine=limit_memory(machine_for(device, config.tables.kernel), config.parallel, own, host),
        ranks=ranks.count,
        ranks_per_node=ranks.per_node,
        global_batch_size=config.step.global_batch_size,
    )
    plan = plan_run(tables, config.parallel, setting)
    if ranks.is_first:
        kinds = Counter(table.sharding for table in plan.tables)
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        print(f"recforge: tables over {ranks.count} ranks: {counts} (`recforge plan` says why)", file=sys.stderr)
    return plan


def _usage() -> str:
    return "\n".join(
        [
            "usage: recforge train RECIPE|CONFIG.toml [--data PATH] [--output RUN] [--seed N] ...",
            "",
            "recipes:",
            *list_recipes(),
            "",
            "`recforge train RECIPE --help` lists every flag of a recipe with its value there.",
        ]
    )


def describe_summary(summary: dict[str, Any]) -> str:
    """Return a summary as people read it."""
    line = f"auc {summary['auc']:.4f}"
    if "bayes_auc" in summary:
        line += (
            f"   best possible {summary['bayes_auc']:.4f}   "
            f"recovered {summary['recovered_auc']:.1%} of what lies above .5"
        )
    return (
        f"{line}\nlogloss {summary['logloss']:.4f}   normalized entropy {summary['normalized_entropy']:.4f}   "
        f"calibration {summary['calibration']:.3f}   on the {summary['split']} split\n"
        f"{summary['samples']:,} samples in {summary['seconds']:.1f} s ({summary['samples_per_second']:,.0f}/s), "
        f"{summary['stopped']}\n{summary['folder']}: `recforge report {summary['folder']}` makes a page of it"
    )

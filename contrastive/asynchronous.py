"""Recommenders of sequences against parameter servers: items' rows lie on shards, each trainer has its own encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from typing_extensions import override

from contrastive.command import SEQUENCES_RUNS, tell_idle_gpu
from contrastive.config import SequenceRunConfig
from contrastive.recipes import RECIPES, SequenceRecipe, list_recipes
from contrastive.run_checks import check_start
from dlrm.asynchronous import command, train, up
from dlrm.asynchronous.config import ServedConfig
from dlrm.asynchronous.served_clicks import SERVED_CLICKS
from dlrm.asynchronous.served_kind import ServedKind
from dlrm.cli import Command
from dlrm.training.command import tell_doubts

if TYPE_CHECKING:
    from contrastive.data.sequence_dataset import SequenceDataset
    from contrastive.model import SequenceModel
    from contrastive.next_item import NextItem
    from embeddings import TableConfig
    from parameter_server.client.remote_tables import AskingShards


@dataclass(frozen=True, kw_only=True)
class ServedSequenceConfig(SequenceRunConfig, ServedConfig):
    """A recipe for sequences, trained by several trainers around parameter servers."""


class ServedSequences(ServedKind):
    """Recommenders of sequences, with or without contrast.

    Each pass over a batch that updates rows has a push of its own, and a pass sees what the one before it has changed.
    """

    kind = SEQUENCES_RUNS
    config = ServedSequenceConfig
    pools = False

    @override
    def knows(self, name: str) -> bool:
        return name in RECIPES

    @override
    def list_recipes(self) -> list[str]:
        return ["", "recipes for sequences:", *list_recipes()]

    @override
    def default(self, config: SequenceRunConfig) -> ServedSequenceConfig:
        return ServedSequenceConfig.of(replace(config, evaluation=replace(config.evaluation, patience=None)))

    @override
    def check(self, config: ServedSequenceConfig) -> None:
        super().check(config)
        if config.mclrec.contrast == "memory":
            raise ValueError(
                "--mclrec.contrast memory: expected another one beside parameter servers, where each trainer would "
                "remember batches of its own; train with `recforge train`"
            )
        if config.mclrec.second_order:
            raise ValueError(
                "--mclrec.second-order: expected one process, got parameter servers, where others step in between; "
                "leave it out, or train with `recforge train`"
            )
        if config.dense_average.is_on_servers and len(config.mclrec.stages) > 1:
            raise ValueError(
                f"--dense-average.mode {config.dense_average.mode}: expected easgd or average beside --mclrec.form "
                f"{config.mclrec.form}, whose passes update different weights, or --mclrec.form joint"
            )

    @override
    def notes(self, config: ServedSequenceConfig) -> list[str]:
        return [f"all of {config.epochs:g} epochs are trained (--epochs), as trainers by themselves do not stop early"]

    @override
    def provide(self, recipe: SequenceRecipe, config: ServedSequenceConfig) -> SequenceDataset:
        from contrastive.data.provide_sequences import provide_sequences

        check_start(config, recipe.config)
        dataset = provide_sequences(config.schema, config.data, is_synthetic=recipe.is_synthetic)
        recipe.tell_doubt(config, dataset.rows("train"))
        return dataset

    @override
    def settle(self, config: ServedSequenceConfig, data: SequenceDataset) -> ServedSequenceConfig:
        tell_doubts(config, data)
        tell_idle_gpu("trainers of parameter servers compute on CPUs")
        return config

    @override
    def describe_tables(self, config: ServedSequenceConfig, data: SequenceDataset) -> list[TableConfig]:
        from contrastive.build import describe_sequence_tables

        return describe_sequence_tables(config, data)

    @override
    def build(self, config: ServedSequenceConfig, data: SequenceDataset, tables: AskingShards) -> SequenceModel:
        from contrastive.build import build_model
        from embeddings.asking import UnpooledTables

        assert isinstance(tables, UnpooledTables)
        return build_model(config, data, built_items=tables)

    @override
    def problem(self, config: ServedSequenceConfig, data: SequenceDataset) -> NextItem:
        from contrastive.served_next_item import ServedNextItem

        return ServedNextItem(data, config)

    @override
    def count_pushes(self, config: ServedSequenceConfig) -> int:
        return sum(stage != "augmenters" for stage in config.mclrec.stages)  # which look rows up, and no more


SERVED_SEQUENCES = ServedSequences()
KINDS = (SERVED_CLICKS, SERVED_SEQUENCES)


def run_ps(argv: list[str]) -> int:
    """Run a part of parameter servers for models of clicks or of sequences."""
    own = {"up": f"{__name__}:run_up", "trainer": f"{__name__}:run_trainer"}
    return command.run_ps(
        argv, {name: Command(part.help, own.get(name, part.target)) for name, part in command.PARTS.items()}
    )


def run_up(argv: list[str]) -> int:
    """See `dlrm.asynchronous.up.run_up`."""
    return up.run_up(argv, KINDS)


def run_trainer(argv: list[str]) -> int:
    """See `dlrm.asynchronous.train.run_trainer`."""
    return train.run_trainer(argv, KINDS)

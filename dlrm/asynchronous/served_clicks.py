"""Models of clicks whose tables lie on parameter servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from dlrm.asynchronous.config import AsynchronousConfig
from dlrm.asynchronous.served_kind import ServedKind
from dlrm.distributed.place import Place
from dlrm.recipes import RECIPES, Recipe, is_file, list_recipes
from dlrm.training.command import CLICKS, rate_by_frequency, tell_doubts

if TYPE_CHECKING:
    from dlrm.data.dataset import Dataset
    from dlrm.model import DLRM
    from dlrm.training.clicks import Clicks
    from embeddings import TableConfig
    from parameter_server.client.remote_tables import AskingShards


class ServedClicks(ServedKind):
    """A DLRM on a prepared log."""

    kind = CLICKS
    config = AsynchronousConfig

    @override
    def knows(self, name: str) -> bool:
        return name in RECIPES or is_file(name)

    @override
    def list_recipes(self) -> list[str]:
        return list_recipes()

    @override
    def provide(self, recipe: Recipe, config: AsynchronousConfig) -> Dataset:
        from dlrm.data.provide import provide_dataset

        return provide_dataset(recipe.source, config.data)

    @override
    def settle(self, config: AsynchronousConfig, data: Dataset) -> AsynchronousConfig:
        tell_doubts(config, data)
        return rate_by_frequency(config, data, Place())

    @override
    def describe_tables(self, config: AsynchronousConfig, data: Dataset) -> list[TableConfig]:
        from dlrm.descriptions import describe_tables

        return describe_tables(data.info, config.model.dim, config.tables, config.small_tables)

    @override
    def build(self, config: AsynchronousConfig, data: Dataset, tables: AskingShards) -> DLRM:
        import torch

        from dlrm.checkpoints.run_state import seed_generators
        from dlrm.model import build_dlrm
        from dlrm.training.train_step import compile_dense

        seed_generators(config.seed)
        model = build_dlrm(
            data.info,
            config.model,
            config.tables,
            config.small_tables,
            seed=config.seed,
            device="cpu",
            built_tables=tables,
        )
        if config.step.compile:
            compile_dense(model, torch.device("cpu"))
        return model

    @override
    def problem(self, config: AsynchronousConfig, data: Dataset) -> Clicks:
        from dlrm.training.clicks import Clicks

        return Clicks(data)


SERVED_CLICKS = ServedClicks()

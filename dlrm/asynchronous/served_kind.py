"""What the asynchronous mode asks of a kind of model: how it is built on tables that lie on shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dlrm.asynchronous.config import check_asynchronous
from dlrm.training.kind import Kind

if TYPE_CHECKING:
    from torch import nn

    from dlrm.training.problem import Problem
    from embeddings import TableConfig
    from parameter_server.client.remote_tables import AskingShards


class ServedKind(ABC):
    """A kind of model that can be trained against parameter servers by name.

    Attributes:
        kind: the same without servers.
        config: of a trainer.
        pools: whether tables give a vector for each bag, or else one for each id.
    """

    kind: Kind
    config: type[Any]
    pools: bool = True

    @abstractmethod
    def knows(self, name: str) -> bool:
        """Say whether there is a recipe of a name, or a file that describes one."""

    @abstractmethod
    def list_recipes(self) -> list[str]:
        """Return a line per recipe."""

    def default(self, config: Any) -> Any:
        """Return the configuration of a trainer that a recipe's comes to."""
        return self.config.of(config)

    def check(self, config: Any) -> None:
        """Check that a configuration asks for nothing that servers or trainers by themselves cannot do.

        Raises:
            ValueError: naming the flag.
        """
        check_asynchronous(config)

    def notes(self, config: Any) -> list[str]:
        """Return what is done otherwise than without servers, a line each."""
        return []

    @abstractmethod
    def provide(self, recipe: Any, config: Any) -> Any:
        """Open the data, and prepare them first where they are not yet.

        Raises:
            ValueError: there are none, or they do not fit.
        """

    def settle(self, config: Any, data: Any) -> Any:
        """Return the configuration with the numbers that follow from the data."""
        return config

    @abstractmethod
    def describe_tables(self, config: Any, data: Any) -> list[TableConfig]:
        """Describe the tables of the model."""

    @abstractmethod
    def build(self, config: Any, data: Any, tables: AskingShards) -> nn.Module:
        """Build a trainer's model; all begin alike, with the master copy, and what they draw later differs."""

    @abstractmethod
    def problem(self, config: Any, data: Any) -> Problem:
        """Say what is learned."""

    def count_pushes(self, config: Any) -> int:
        """Return how often a batch updates its rows."""
        return 1


def choose_kind(kinds: Sequence[ServedKind], name: str) -> ServedKind:
    """Return the kind that has a recipe of a name, or else the last one, whose complaint lists what all have."""
    return next((kind for kind in kinds if kind.knows(name)), kinds[-1])


def list_recipes(kinds: Sequence[ServedKind]) -> list[str]:
    """Return what usages say of recipes."""
    return ["recipes:", *(line for kind in kinds for line in kind.list_recipes())]

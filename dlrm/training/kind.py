"""What `recforge train` does for every kind of model: parses, joins ranks, provides data, builds, trains and tells."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dlrm.cli import parse
from dlrm.config import PlacedConfig
from dlrm.distributed.one_voice import OneVoice
from dlrm.distributed.place import Place
from dlrm.this_machine import count_cores

if TYPE_CHECKING:
    from dlrm.distributed.process_group import Group
    from dlrm.training.trainer import Trainer

# What ranks may have of their own: places on their machines, and who started them. Data are compared by content.
OWN = ("output", "data", "branch_from", "ranks", "max_restarts")
SHORT = {"--global-batch-size": "--step.global-batch-size"}


class NamedRecipe(Protocol):
    """A named value that a run begins with."""

    @property
    def help(self) -> str:
        """One line for the list of recipes."""

    @property
    def config(self) -> Any:
        """Of the run."""


class Kind(ABC):
    """A kind of model that can be trained by name.

    Attributes:
        module: `python -m MODULE train ...` is the same command, as ranks are started.
        config: its runs' configuration.
    """

    module: str
    config: type[Any]

    @abstractmethod
    def find(self, name: str) -> NamedRecipe:
        """Return the recipe of a name.

        Raises:
            ValueError: there is none.
        """

    @abstractmethod
    def usage(self) -> str:
        """Say how the command is called, and list the recipes."""

    def scale(self, config: Any, place: Place) -> Any:
        """Return the configuration with its numbers scaled to the batch size, if they are to be."""
        return config

    @abstractmethod
    def provide(self, recipe: Any, config: Any, group: Group) -> Any:
        """Prepare the data on rank 0 where they are not yet, and open them on all."""

    @abstractmethod
    def build(self, name: str, config: Any, output: Path, data: Any, group: Group) -> Trainer:
        """Build the model of a recipe on its device, over the ranks there are, and its trainer."""

    @abstractmethod
    def describe(self, summary: dict[str, Any]) -> str:
        """Return a summary as people read it."""


def run(kind: Kind, argv: Sequence[str]) -> int:
    """Train what `argv` names: a recipe or a configuration file, then flags."""
    if not argv or argv[0].startswith("-"):
        print(kind.usage())
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    place = Place.from_environment()
    place.end_with_launcher()
    place.keep_torch_quiet()
    with OneVoice(place) as voice:
        recipe = kind.find(argv[0])
        program = f"recforge train {argv[0]}"
        config = parse(
            kind.config, argv[1:], program=program, description=recipe.help, default=recipe.config, short=SHORT
        )
        if not place.is_launched and (config.ranks or 1) > 1:
            return _launch(kind, argv, config)
        summary = train(kind, argv[0], recipe, config, voice=voice)
    if place.rank == 0:
        print(kind.describe(summary))
    return 0


def train(kind: Kind, name: str, recipe: NamedRecipe, config: Any, *, voice: OneVoice | None = None) -> dict[str, Any]:
    """Join the other ranks if there are any, provide the data, build the model, train it, and return the summary.

    Raises:
        ValueError: see `Kind.scale`, `Trainer` and `join_ranks`; or `config.output` holds a run of another
            configuration.
    """
    import torch

    from dlrm.distributed.hang_watch import BUILDING, PREPARING, HangWatch
    from dlrm.distributed.process_group import join_ranks
    from dlrm.training.run_config import leaves
    from dlrm.training.train_step import check_compile, choose_device, describe_step

    voice = voice or OneVoice(Place())
    place, limit = voice.place, config.parallel.hang_timeout_seconds
    config = kind.scale(config, place)
    if place.is_launched and config.ranks not in (None, place.count):
        raise ValueError(f"--ranks {config.ranks}: torchrun has started {place.count}; leave --ranks out")
    torch.set_num_threads(config.step.threads or max(1, count_cores() // place.per_node))
    device = choose_device(config.step.device)
    if config.step.compile:
        check_compile(device, cuda_graphs=config.step.cuda_graphs)
    settings = {setting: value for setting, value in leaves(asdict(config)) if setting.split(".")[0] not in OWN}
    with (
        join_ranks(place, device, settings, hang_timeout_seconds=limit, on_meeting=voice.share) as group,
        HangWatch(group, voice, timeout_seconds=limit) as watch,
    ):
        output = config.output or Path(group.keep_name("output", name_run(name)))
        if place.rank == 0:
            lines = describe_step(config.step, device, torch.get_num_threads(), ranks_on_machine=place.per_node)
            for line in [f"run {output}", *lines]:
                print(f"recforge: {line}", file=sys.stderr)
        with watch.stage(PREPARING):
            data = kind.provide(recipe, config, group)
        with watch.stage(BUILDING):
            trainer = kind.build(name, config, output, data, group)
        watch.follow(trainer.stopwatch, lambda: trainer.progress.samples)
        return trainer.fit()


def name_run(name: str) -> str:
    """Return a folder for a run of a recipe that nobody has named."""
    return str(Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}")


def _launch(kind: Kind, argv: Sequence[str], config: PlacedConfig) -> int:
    """Start this command on several ranks, which share a folder through all restarts."""
    from dlrm.distributed.launch import check_room, launch_ranks

    check_room(config.ranks or 1)
    output = [] if config.output is not None else ["--output", name_run(argv[0])]
    program = ["-m", kind.module, "train", *argv, *output]
    return launch_ranks(program, ranks=config.ranks or 1, max_restarts=config.max_restarts)

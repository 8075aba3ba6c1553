"""`recforge ps trainer`: joins a run of parameter servers with a recipe, and trains what the coordinator gives it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dlrm.asynchronous.config import AsynchronousConfig, check_asynchronous
from dlrm.cli import parse
from dlrm.distributed.place import Place
from dlrm.recipes import Recipe, find_recipe, list_recipes
from dlrm.training.command import rate_by_frequency, scale_to_batch, tell_doubts
from dlrm.training.kind import SHORT
from parameter_server.address import Address
from parameter_server.description import RunDescription

if TYPE_CHECKING:
    from dlrm.asynchronous.dense_average import DenseAverage
    from dlrm.asynchronous.leased_batches import LeasedBatches
    from dlrm.asynchronous.membership import Membership
    from dlrm.asynchronous.servers import Shards
    from dlrm.data.dataset import Dataset
    from dlrm.model import DLRM
    from dlrm.training.attach import RunParts
    from dlrm.training.attachments import Attachment
    from embeddings import TableConfig
    from parameter_server.control.coordinator_client import CoordinatorClient
    from parameter_server.transports import ShardConnection

# What trainers may have of their own; nothing of it bends what is learned.
OWN = (
    "output",
    "data",
    "branch_from",
    "servers",
    "client",
    "step",
    "time_limit_seconds",
    "log_every_samples",
    "parallel",
    "noise_scale",
)


def run_trainer(argv: list[str]) -> int:
    """Train as one of several what `argv` names: a recipe or a configuration file, then flags."""
    if not argv or argv[0].startswith("-"):
        print(_usage())
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    recipe = find_recipe(argv[0])
    config = parse(
        AsynchronousConfig,
        argv[1:],
        program=f"recforge ps trainer {argv[0]}",
        description=recipe.help,
        default=AsynchronousConfig.of(recipe.config),
        short=SHORT,
    )
    summary = train(argv[0], recipe, config)
    print(f"{config.servers.name}: {summary['stopped']}" + (f", auc {summary['auc']:.4f}" if "auc" in summary else ""))
    return 0


def train(name: str, recipe: Recipe, config: AsynchronousConfig) -> dict[str, Any]:
    """Join the run, train until no data are left, and return the summary; of all but the last to leave a short one.

    Raises:
        ValueError: a setting is not for parameter servers, or others of the run have another one.
        ConnectionError: the coordinator or a shard cannot be reached.
    """
    import torch

    from dlrm.asynchronous.branching import check_output
    from dlrm.data.provide import provide_dataset
    from dlrm.descriptions import describe_tables
    from dlrm.training.train_step import check_compile
    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.transports import GrpcConnection

    config = scale_to_batch(config, Place())
    check_asynchronous(config)
    if config.step.compile:
        check_compile(torch.device("cpu"), cuda_graphs=config.step.cuda_graphs)
    if config.output is None:
        raise ValueError("--output: expected the run's folder, the same for all trainers, got none")
    check_output(config.output)
    Address.parse(config.servers.coordinator, "--servers.coordinator")
    dataset = provide_dataset(recipe.source, config.data)
    tell_doubts(config, dataset)
    config = rate_by_frequency(config, dataset, Place())
    tables = describe_tables(dataset.info, config.model.dim, config.tables, config.small_tables)
    security = config.client.client_security
    client = GrpcCoordinatorClient(
        config.servers.coordinator, security, deadline_seconds=config.servers.deadline_seconds
    )
    try:
        return train_with(client, lambda address: GrpcConnection(address, security), name, config, dataset, tables)
    finally:
        client.close()


def describe_asynchronous(config: AsynchronousConfig, dataset: Dataset, tables: list[TableConfig]) -> RunDescription:
    """Describe a run to its coordinator, so that no trainer of other data or settings takes part.

    Args:
        config: of a trainer.
        dataset: prepared.
        tables: of the model.

    Raises:
        ValueError: there is no checkpoint to begin with.
    """
    from dlrm.asynchronous.branching import find_first_sample
    from dlrm.training.run_config import leaves
    from parameter_server.shard.dense_update import OPTIONS

    settings = {name: value for name, value in leaves(asdict(config)) if name.split(".")[0] not in OWN}
    settings |= {"data": dataset.fingerprint, OPTIONS: config.dense_average.server_options(config.dense)}
    rows = dataset.rows("train")
    samples = max(1, round(config.epochs * rows))
    return RunDescription(
        run_id=0,
        seed=config.seed,
        tables=tuple(tables),
        lanes=config.servers.lanes,
        staleness=config.servers.staleness,
        durability=config.servers.durability,
        dense=config.dense_average.mode,
        samples=samples,
        epoch_samples=rows,
        first_sample=find_first_sample(config.branch_from, config.branch_at),
        batch_size=config.trainer_batch_size,
        chunk_batches=config.servers.chunk_batches,
        alone_samples=config.servers.alone_for(samples),
        settings=json.loads(json.dumps(settings, default=str)),
    )


def train_with(
    client: CoordinatorClient,
    connect: Callable[[str], ShardConnection],
    name: str,
    config: AsynchronousConfig,
    dataset: Dataset,
    tables: list[TableConfig],
) -> dict[str, Any]:
    """Train as one of several.

    Args:
        client: of the coordinator.
        connect: opens a connection to a shard's address.
        name: of the recipe.
        config: of this trainer, checked.
        dataset: prepared.
        tables: of the model.
    """
    import torch

    from dlrm.asynchronous.branching import brings_weights
    from dlrm.asynchronous.joining import join_run
    from dlrm.asynchronous.servers import Shards
    from dlrm.asynchronous.shared_batch import SharedBatch
    from dlrm.asynchronous.trainer import AsynchronousTrainer
    from dlrm.this_machine import count_cores

    output = config.output
    assert output is not None
    torch.set_num_threads(config.step.threads or max(1, count_cores()))
    with ExitStack() as stack:
        described = describe_asynchronous(config, dataset, tables)
        membership = stack.enter_context(join_run(client, config.servers.name, described, config.servers.coordinator))
        shards = stack.enter_context(closing(Shards(client, connect, membership.description, config.servers)))
        model = build_model(config, dataset, shards)
        brings = config.branch_from is not None and brings_weights(membership)
        leased = lease_batches(config, dataset, membership, shards)

        def attach(run: RunParts) -> list[Attachment]:
            average = stack.enter_context(closing(average_dense(run, config, membership, shards, leased)))
            return [SharedBatch(run.model, config), average]

        trainer = AsynchronousTrainer(
            model,
            dataset,
            config,
            output,
            recipe=name,
            membership=membership,
            leased=leased,
            servers=shards,
            others=attach,
            brings_weights=brings,
        )
        return trainer.fit()


def build_model(config: AsynchronousConfig, dataset: Dataset, shards: Shards) -> DLRM:
    """Build a trainer's model; trainers begin alike, with the master copy, and what they draw later differs.

    Args:
        config: of this trainer.
        dataset: prepared.
        shards: that hold the tables.
    """
    import torch

    from dlrm.checkpoints.run_state import seed_generators
    from dlrm.model import build_dlrm
    from dlrm.training.train_step import compile_dense

    seed_generators(config.seed)
    model = build_dlrm(
        dataset.info,
        config.model,
        config.tables,
        config.small_tables,
        seed=config.seed,
        device="cpu",
        built_tables=shards.tables,
    )
    if config.step.compile:
        compile_dense(model, torch.device("cpu"))
    return model


def lease_batches(
    config: AsynchronousConfig, dataset: Dataset, membership: Membership, shards: Shards
) -> LeasedBatches:
    """Make a trainer's batches, and have others told how far they are.

    Args:
        config: of this trainer.
        dataset: prepared.
        membership: of this trainer.
        shards: that hold the tables.
    """
    from dlrm.asynchronous.leased_batches import LeasedBatches
    from dlrm.data.reader import Reader

    reader = Reader(dataset, "train", shuffle=config.shuffle, seed=config.seed)
    leased = LeasedBatches(reader, membership, shards.tables, is_gated=membership.description.staleness is not None)
    membership.facts = leased.facts
    return leased


def average_dense(
    run: RunParts, config: AsynchronousConfig, membership: Membership, shards: Shards, leased: LeasedBatches
) -> DenseAverage:
    """Make what keeps a trainer's dense part together with those of the others, in a lane of its own.

    Args:
        run: of this trainer.
        config: of this trainer.
        membership: of this trainer.
        shards: that hold the master copy.
        leased: says which batch gradients are of.
    """
    from dlrm.asynchronous.dense_average import DenseAverage
    from parameter_server.client.dense_client import Place

    lane = membership.client.client_lane(membership.member)
    average = DenseAverage(
        run.model,
        run.optimizer,
        shards.open_dense(),
        config.dense_average,
        lane=lane,
        count_trainers=membership.count_trainers,
        place=lambda: Place(*leased.place.lease, leased.place.clock),
        ends_chunk=lambda: leased.ends_chunk,
    )
    if config.dense_average.is_on_servers:
        leased.wait_for(lambda: average.under_way)
    membership.last_clocks[lane.lane] = lambda: average.last_clock
    return average


def _usage() -> str:
    return "\n".join(
        [
            "usage: recforge ps trainer RECIPE|CONFIG.toml --servers.coordinator ADDRESS --output RUN [flags]",
            "",
            "recipes:",
            *list_recipes(),
            "",
            "`recforge ps trainer RECIPE --help` lists every flag of a recipe with its value there.",
        ]
    )

"""`recforge ps trainer`: joins a run of parameter servers with a recipe, and trains what the coordinator gives it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dlrm.asynchronous.config import ServedConfig
from dlrm.asynchronous.served_clicks import SERVED_CLICKS
from dlrm.asynchronous.served_kind import ServedKind, choose_kind, list_recipes
from dlrm.cli import parse
from dlrm.distributed.place import Place
from dlrm.training.kind import SHORT, NamedRecipe
from parameter_server.address import Address
from parameter_server.description import RunDescription

if TYPE_CHECKING:
    from dlrm.asynchronous.dense_average import DenseAverage
    from dlrm.asynchronous.leased_batches import LeasedBatches
    from dlrm.asynchronous.membership import Membership
    from dlrm.asynchronous.servers import Shards
    from dlrm.training.attachments import Attachment
    from dlrm.training.problem import Prepared, SampleReader
    from dlrm.training.run_parts import RunParts
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


def run_trainer(argv: list[str], kinds: Sequence[ServedKind] = (SERVED_CLICKS,)) -> int:
    """Train as one of several what `argv` names: a recipe or a configuration file, then flags."""
    if not argv or argv[0].startswith("-"):
        print(_usage(kinds))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    served = choose_kind(kinds, argv[0])
    recipe = served.kind.find(argv[0])
    config = parse(
        served.config,
        argv[1:],
        program=f"recforge ps trainer {argv[0]}",
        description=recipe.help,
        default=served.default(recipe.config),
        short=SHORT,
    )
    summary = train(argv[0], recipe, config, served)
    measured = [served.kind.describe(summary).splitlines()[0]] if "split" in summary else []
    print(f"{config.servers.name}: {', '.join([summary['stopped'], *measured])}")
    return 0


def train(name: str, recipe: NamedRecipe, config: Any, served: ServedKind = SERVED_CLICKS) -> dict[str, Any]:
    """Join the run, train until no data are left, and return the summary; of all but the last to leave a short one.

    Raises:
        ValueError: a setting is not for parameter servers, or others of the run have another one.
        ConnectionError: the coordinator or a shard cannot be reached.
    """
    import torch

    from dlrm.asynchronous.branching import check_output
    from dlrm.training.train_step import check_compile
    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.transports import GrpcConnection

    config = served.kind.scale(config, Place())
    served.check(config)
    if config.step.compile:
        check_compile(torch.device("cpu"), cuda_graphs=config.step.cuda_graphs)
    if config.output is None:
        raise ValueError("--output: expected the run's folder, the same for all trainers, got none")
    check_output(config.output)
    Address.parse(config.servers.coordinator, "--servers.coordinator")
    dataset = served.provide(recipe, config)
    config = served.settle(config, dataset)
    tables = served.describe_tables(config, dataset)
    security = config.client.client_security
    client = GrpcCoordinatorClient(
        config.servers.coordinator, security, deadline_seconds=config.servers.deadline_seconds
    )
    try:
        return train_with(
            client, lambda address: GrpcConnection(address, security), name, config, dataset, tables, served
        )
    finally:
        client.close()


def describe_asynchronous(config: ServedConfig, dataset: Prepared, tables: list[TableConfig]) -> RunDescription:
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
    config: Any,
    dataset: Any,
    tables: list[TableConfig],
    served: ServedKind = SERVED_CLICKS,
) -> dict[str, Any]:
    """Train as one of several.

    Args:
        client: of the coordinator.
        connect: opens a connection to a shard's address.
        name: of the recipe.
        config: of this trainer, checked.
        dataset: prepared.
        tables: of the model.
        served: what is trained.
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
        opened = Shards(client, connect, membership.description, config.servers, pools=served.pools)
        shards = stack.enter_context(closing(opened))
        model, problem = served.build(config, dataset, shards.tables), served.problem(config, dataset)
        brings = config.branch_from is not None and brings_weights(membership)
        reader = problem.reader("train", config)
        leased = lease_batches(reader, membership, shards, pushes=served.count_pushes(config))

        def attach(run: RunParts) -> list[Attachment]:
            average = stack.enter_context(closing(average_dense(run, config, membership, shards, leased)))
            return [SharedBatch(run.model, config), average]

        trainer = AsynchronousTrainer(
            model,
            problem,
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


def lease_batches(reader: SampleReader, membership: Membership, shards: Shards, *, pushes: int) -> LeasedBatches:
    """Make a trainer's batches, and have others told how far they are.

    Args:
        reader: of the train split.
        membership: of this trainer.
        shards: that hold the tables.
        pushes: how often a batch updates its rows.
    """
    from dlrm.asynchronous.leased_batches import LeasedBatches

    is_gated = membership.description.staleness is not None
    leased = LeasedBatches(reader, membership, shards.tables, is_gated=is_gated, pushes=pushes)
    membership.facts = leased.facts
    return leased


def average_dense(
    run: RunParts, config: ServedConfig, membership: Membership, shards: Shards, leased: LeasedBatches
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


def _usage(kinds: Sequence[ServedKind]) -> str:
    return "\n".join(
        [
            "usage: recforge ps trainer RECIPE|CONFIG.toml --servers.coordinator ADDRESS --output RUN [flags]",
            "",
            *list_recipes(kinds),
            "",
            "`recforge ps trainer RECIPE --help` lists every flag of a recipe with its value there.",
        ]
    )

"""From a configuration to a recommender of sequences: its tables, where they lie, its encoder and its augmenters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from contrastive.augmenters import Augmenters
from contrastive.config import SequenceRunConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.encoders.build import build_encoder
from contrastive.losses.cross_batch_memory import CrossBatchMemory
from contrastive.model import SequenceModel
from dlrm.checkpoints.run_state import seed_generators
from dlrm.descriptions import describe_tables
from dlrm.distributed.ranks import Ranks
from dlrm.planning.plan_run import parse_fixed
from dlrm.training.train_step import set_matmul_precision
from embeddings import ShardingPlan, TableConfig
from embeddings.asking import UnpooledTables
from embeddings.shards import Sharding, place


def describe_sequence_tables(config: SequenceRunConfig, dataset: SequenceDataset) -> list[TableConfig]:
    """Describe the table of items, and one for each of their side features."""
    return describe_tables(dataset.info, config.dim, config.tables)


def place_tables(config: SequenceRunConfig, dataset: SequenceDataset, ranks: Ranks) -> ShardingPlan:
    """Place tables as `--parallel.sharding` and `--parallel.tables` say, or copy small ones and cut large ones by rows.

    Cutting a large one saves memory. It saves time only where items are drawn, as a full softmax looks the whole table
    up on each rank; `--parallel.sharding replicated` copies it there.

    Raises:
        ValueError: naming the flag, for a table that there is not, and for a kind that a plan by rows has not.
    """
    described, asked = describe_sequence_tables(config, dataset), config.parallel
    fixed = parse_fixed(asked.tables, [table.name for table in described])
    tables = []
    for table in described:
        kind: Sharding = "replicated" if table.num_rows < asked.replicate_below_rows else "row_wise"
        if asked.sharding != "auto":
            kind = asked.sharding
        kind = fixed.get(table.name, kind)
        if kind in ("table_row_wise", "grid"):
            raise ValueError(
                f"--parallel.sharding: expected auto, replicated, row_wise, column_wise or table_wise for table "
                f"'{table.name}' of sequences, got {kind}"
            )
        tables.append(place(table, kind, range(ranks.count)))
    return ShardingPlan(ranks=ranks.count, ranks_per_node=ranks.per_node, tables=tuple(tables))


def build_model(
    config: SequenceRunConfig,
    dataset: SequenceDataset,
    *,
    plan: ShardingPlan | None = None,
    tables: Sequence[TableConfig] | None = None,
    built_items: UnpooledTables | None = None,
    device: torch.device | str = "cpu",
) -> SequenceModel:
    """Build the model of a run; equal seeds give equal weights in any number of processes.

    Args:
        config: of the run.
        dataset: prepared.
        plan: where rows lie; None keeps all here.
        tables: as `describe_sequence_tables` gives them, if not these.
        built_items: see `SequenceModel`.
        device: see `SequenceModel`.
    """
    seed_generators(config.seed)
    encoder: nn.Module = build_encoder(config.encoder, config.dim, config.sequence.max_length)
    augmenters = None
    if config.mclrec.contrast == "augmenters":
        augmenters = Augmenters(config.dim, config.mclrec.augmenter_widths, shared=config.mclrec.shared)
    memory = None
    if config.mclrec.contrast == "memory":
        memory = CrossBatchMemory(config.dim, config.mclrec.memory_size, config.mclrec.temperature)
    set_matmul_precision(config.step.precision)
    return SequenceModel(
        tables or describe_sequence_tables(config, dataset),
        encoder,
        augmenters,
        memory=memory,
        seed=config.seed,
        plan=plan,
        exchange=config.parallel.exchange,
        built_items=built_items,
        device=device,
    )

"""From a configuration to a recommender of sequences: its tables, where they lie, its encoder and its augmenters."""

from __future__ import annotations

from collections.abc import Sequence

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
from dlrm.training.train_step import set_matmul_precision
from embeddings import ShardingPlan, TableConfig
from embeddings.asking import UnpooledTables
from embeddings.shards import place


def describe_sequence_tables(config: SequenceRunConfig, dataset: SequenceDataset) -> list[TableConfig]:
    """Describe the table of items, and one for each of their side features."""
    return describe_tables(dataset.info, config.dim, config.tables)


def place_tables(config: SequenceRunConfig, dataset: SequenceDataset, ranks: Ranks) -> ShardingPlan:
    """Copy small tables to all ranks, and cut large ones by rows.

    A full softmax looks the whole table up on each rank, so that only what is drawn from makes a large one worth it.
    """
    everyone = range(ranks.count)
    tables = [
        place(table, "replicated" if table.num_rows < config.parallel.replicate_below_rows else "row_wise", everyone)
        for table in describe_sequence_tables(config, dataset)
    ]
    return ShardingPlan(ranks=ranks.count, ranks_per_node=ranks.per_node, tables=tuple(tables))


def build_model(
    config: SequenceRunConfig,
    dataset: SequenceDataset,
    *,
    plan: ShardingPlan | None = None,
    tables: Sequence[TableConfig] | None = None,
    built_items: UnpooledTables | None = None,
) -> SequenceModel:
    """Build the model of a run; equal seeds give equal weights in any number of processes.

    Args:
        config: of the run.
        dataset: prepared.
        plan: where rows lie; None keeps all here.
        tables: as `describe_sequence_tables` gives them, if not these.
        built_items: see `SequenceModel`.
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
    )

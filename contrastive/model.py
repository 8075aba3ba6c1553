"""A recommender of sequences: item rows from tables, an encoder of histories, augmenters that learn to vary them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from contrastive.augmenters import Augmenters
from contrastive.data.sequences import ITEM, PAD
from contrastive.sequence_batch import Histories, SequenceBatch
from embeddings import ShardingPlan, TableConfig
from embeddings.asking import UnpooledTables
from embeddings.build import build_sequence_tables, build_tables
from embeddings.interface import Tables
from embeddings.shards import Exchange


class SequenceModel(nn.Module):
    """Maps histories to vectors, whose inner products with items' rows say what comes next.

    Args:
        tables: the first one is of items; further ones are of side features, whose pooled rows are added to an item's.
        encoder: `encoder(vectors [T, dim], lengths [B], hidden [T])` gives [B, dim]; see `contrastive.encoders`.
        augmenters: of training; None without.
        memory: of training: contrasts views with those of earlier batches; None without.
        seed: of the tables' rows; everything else draws from torch's generator, as any module.
        plan: which rank holds which rows of all tables; None holds all of them here.
        exchange: type in which rows travel between ranks.
        built_items: all tables, where somebody has built them, as on servers. Side features are then looked up with the
            items, a vector for each id; see `SequenceReader.joins_sides`.
        device: of all but the tables. These lie in the CPU's memory, where catalogues fit that a GPU has no room for,
            and a batch's rows travel.

    Raises:
        ValueError: tables differ in their rows' length, or others were built.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        encoder: nn.Module,
        augmenters: Augmenters | None = None,
        *,
        memory: nn.Module | None = None,
        seed: int = 0,
        plan: ShardingPlan | None = None,
        exchange: Exchange = "fp32",
        built_items: UnpooledTables | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        items, *sides = tables
        for table in sides:
            if table.dim != items.dim:
                raise ValueError(f"table '{table.name}': expected rows of {items.dim}, as items have, got {table.dim}")
        if built_items is not None and built_items.table_configs != tuple(tables):
            raise ValueError("built_items: expected those of `tables`, in their order, got others")
        of_items = None if plan is None else replace(plan, tables=plan.tables[:1])
        self.items = built_items or build_sequence_tables([items], seed=seed, plan=of_items, exchange=exchange)
        self.sides: Tables | None = None
        self._joined = sides if built_items is not None else ()
        if sides and built_items is None:
            of_sides = None if plan is None else replace(plan, tables=plan.tables[1:])
            self.sides = build_tables(sides, seed=seed, plan=of_sides, exchange=exchange)
        self.device = torch.device(device)
        self.encoder, self.augmenters, self.memory = encoder, augmenters, memory
        for part in (encoder, augmenters, memory):
            if part is not None:
                part.to(self.device)
        self.dim, self.num_rows = items.dim, items.num_rows

    def rows(self, batch: SequenceBatch) -> Tensor:
        """Look up what a batch needs, once: the vectors [n, dim] of its items, on the model's device."""
        found = self.items(batch.sparse)
        rows: Tensor = found[ITEM].values()
        for table in self._joined:
            rows = rows + _pool(table, found[table.name].values(), batch)
        if self.sides is not None and batch.sides is not None:
            pooled = self.sides(batch.sides).values()
            rows = rows + pooled.unflatten(1, (-1, self.dim)).sum(1)
        return rows.to(self.device)

    def encode(self, rows: Tensor, *histories: Histories) -> tuple[Tensor, ...]:
        """Encode sets of histories side by side, [B, dim] each, of the rows' type, whatever the encoder computes in.

        PAD in a history gets no gradient, as nobody has acted on it; as a class of the softmax its row does learn. It
        is a hidden item, but by itself a history of nothing, of which PAD's row and a position are all that is seen.
        """
        places = torch.cat([each.places for each in histories])
        lengths = torch.cat([each.lengths for each in histories])
        vectors = nn.functional.embedding(places, rows, padding_idx=PAD)
        if not len(lengths):  # a rank's share of a small batch
            return tuple(vectors.reshape(0, self.dim) for _ in histories)
        is_alone = (lengths == 1).repeat_interleave(lengths, output_size=len(places))
        encoded: Tensor = self.encoder(vectors, lengths, (places == PAD) & ~is_alone).to(rows.dtype)
        parts: tuple[Tensor, ...] = encoded.split([len(each.lengths) for each in histories])
        return parts

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Return the vectors [B, dim] of a batch's histories."""
        return self.encode(self.rows(batch), batch.history)[0]


def _pool(table: TableConfig, vectors: Tensor, batch: SequenceBatch) -> Tensor:
    """Pool the vectors [m, dim] of a side feature's ids to one for each item that was looked up."""
    assert batch.sides is not None
    lengths = batch.sides[table.name].lengths()
    pooled = vectors.new_zeros(len(lengths), table.dim)
    pooled = pooled.index_add(0, torch.repeat_interleave(lengths), vectors)
    return pooled / lengths.clamp_min(1).unsqueeze(1) if table.pooling == "mean" else pooled

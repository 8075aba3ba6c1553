"""Tables that do not pool: a vector for each id, for models of sequences; in this process or over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from typing_extensions import override

from embeddings.asking import AskingTables
from embeddings.jagged import Jagged
from embeddings.local.local_rows import Bags
from embeddings.local.whole_rows import WholeRows
from embeddings.sharded.sharded_rows import ShardedRows
from embeddings.shards import Exchange, ShardingPlan
from embeddings.tables import TableConfig


class SequenceTables(AskingTables):
    """The unpooled twin of ``Tables``, with the interface of torchrec's ``EmbeddingCollection``.

    Each id is a bag of its own, so that rows, their optimizers, plans and exchanges are those of pooled tables.
    Weights of a batch and a table's ``pooling`` have no meaning here.

    Args:
        configs: The tables.
        plan: What lies on which rank; None, or one of a single rank, keeps all rows here. See ``ShardedTables``.
        seed: See ``build_tables``.
        exchange: See ``ShardedTables``.
    """

    def __init__(
        self,
        configs: Sequence[TableConfig],
        *,
        plan: ShardingPlan | None = None,
        seed: int = 0,
        exchange: Exchange = "fp32",
    ) -> None:
        if plan is not None:
            plan.check(configs)
        if plan is not None and plan.ranks > 1:
            super().__init__(configs, ShardedRows(configs, plan, seed=seed, exchange=exchange))
        else:
            super().__init__(configs, WholeRows(configs, seed=seed))

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Looks up: for each feature the vectors of its ids [num_ids, dim], bag after bag, and the bags' lengths.

        Otherwise as ``Tables.forward``.
        """
        batch, vectors = self._look_up(features)
        sizes = [count * dim for count, dim in zip(batch.ids_per_feature, self.feature_dims, strict=True)]
        lengths = features.lengths().view(len(features.keys()), batch.batch_size)
        return {
            name: JaggedTensor(values=values.view(-1, dim), lengths=lengths[position])
            for name, values, dim, position in zip(
                self.feature_names, vectors.split(sizes), self.feature_dims, batch.positions, strict=True
            )
        }

    @override
    def _ask(self, batch: Jagged) -> tuple[Bags, int]:
        segments, size = [], 0
        for feature, (position, count) in enumerate(zip(batch.positions, batch.ids_per_feature, strict=True)):
            first = int(batch.offsets[position * batch.batch_size])
            segments.append((feature, first, count, size, self.feature_dims[feature]))
            size += count * self.feature_dims[feature]
        cells = np.array(segments, dtype=np.int64)
        return Bags(ids=batch.ids, offsets=torch.arange(len(batch.ids) + 1), weights=None, segments=cells), size

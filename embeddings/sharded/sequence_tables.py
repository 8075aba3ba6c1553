"""Tables that do not pool: a vector for each id, for models of sequences; in this process or over ranks."""

from __future__ import annotations

from collections.abc import Sequence

from embeddings.asking import UnpooledTables
from embeddings.local.whole_rows import WholeRows
from embeddings.sharded.sharded_rows import ShardedRows
from embeddings.shards import Exchange, ShardingPlan
from embeddings.tables import TableConfig


class SequenceTables(UnpooledTables):
    """Unpooled tables, whole or this rank's shards.

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

"""Tables on the CPUs of several ranks: ids go to where the rows lie, pooled vectors come back."""

from __future__ import annotations

from collections.abc import Sequence

from embeddings.asking import PooledTables
from embeddings.sharded.sharded_rows import ShardedRows
from embeddings.shards import Exchange, ShardingPlan
from embeddings.tables import TableConfig


class ShardedTables(PooledTables):
    """Tables of which this rank holds the shards that a plan gives it.

    Each rank looks up its own samples. Rows are updated inside backward with the sum of the gradients of all ranks, so
    each rank's loss is the sum over its samples divided by the *global* batch size. ``forward``, ``backward`` after it
    in training, and ``prefetch`` are collective calls: every rank makes them in the same order, with a batch of no
    samples where it has none left.

    The exchange is flat: each rank that holds rows of a bag sends the sum over its own rows to the rank that asked,
    also where it shares a machine with others that hold rows of the same bag (``table_row_wise``, ``grid``,
    ``row_wise``). An exchange in two stages would add these up on their machine and send one vector. So a bag whose ids
    lie on ``k`` ranks of another machine costs ``k`` vectors between the machines instead of 1, each way: the same with
    one id per bag, and with more at most as many times the bytes as a machine has ranks, or a bag ids. What that comes
    to is in ``exchanged_bytes`` and in the plan's predictions.

    Args:
        configs: The tables.
        plan: What lies on which rank of ``torch.distributed``'s default group.
        seed: See ``build_tables``.
        exchange: Type in which vectors and gradients travel, see ``VectorExchange``; ids are exact.

    Attributes:
        plan: As given.
        bytes_sent: What has left this process so far, in bytes: "ids", "rows", "gradients" and optimizers' "sums". What
            a rank asks of itself does not count; an all-reduce counts what goes into it, once.

    Raises:
        ValueError: When the plan is not one of these tables, or of the running group.
    """

    def __init__(
        self, configs: Sequence[TableConfig], *, plan: ShardingPlan, seed: int = 0, exchange: Exchange = "fp32"
    ) -> None:
        rows = ShardedRows(configs, plan, seed=seed, exchange=exchange)
        super().__init__(configs, rows)
        self.plan = plan
        self.bytes_sent = rows.bytes_sent

"""Tables in this process's memory on the CPU, over our own row kernels."""

from __future__ import annotations

from collections.abc import Sequence

from embeddings.asking import PooledTables
from embeddings.local.whole_rows import WholeRows
from embeddings.tables import TableConfig


class LocalTables(PooledTables):
    """Whole tables on the CPU.

    Args:
        configs: The tables.
        seed: See ``build_tables``.
    """

    def __init__(self, configs: Sequence[TableConfig], *, seed: int = 0) -> None:
        super().__init__(configs, WholeRows(configs, seed=seed))

"""What an embedding table is, how its rows are looked up and how they are updated.

Only the torch-free descriptions are imported here, so that configuration and command-line modules start fast;
``embeddings.build.build_tables`` makes the tables themselves.
"""

from embeddings.row_optimizers import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowOptimizer, RowSGD, RowWiseAdagrad
from embeddings.shards import Shard, Sharding, ShardingPlan, TablePlan
from embeddings.tables import UNBOUNDED, IdOutOfRangeError, TableConfig

__all__ = [
    "UNBOUNDED",
    "IdOutOfRangeError",
    "RowAdagrad",
    "RowAdam",
    "RowCowClip",
    "RowLamb",
    "RowOptimizer",
    "RowSGD",
    "RowWiseAdagrad",
    "Shard",
    "Sharding",
    "ShardingPlan",
    "TableConfig",
    "TablePlan",
]

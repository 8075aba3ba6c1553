"""Has a run's row kernels compiled before a shard says that it is there, or its first push would wait for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.description import RunDescription
from parameter_server.partition import Routes
from parameter_server.shard.shard import Shard
from parameter_server.wire import Header, Op, Type, encode, join

_TYPES = {Type.FP32: np.float32, Type.FP16: np.float16}


def warm_up(description: RunDescription) -> None:
    """Pushes to, pulls from and evicts rows of tables like the run's, which are then forgotten.

    A call that had to wait for a compiler would be given up by its caller, and sent again and again; and as compiling
    keeps heartbeats waiting too, the coordinator would take the shard for dead.
    """
    growth = {name: replace(of_table, spill=False) for name, of_table in description.growth.items()}
    shard = Shard(replace(description, durability="none", growth=growth), 0)
    shard.set_routes(Routes(epoch=1, owners=np.zeros(NUM_BUCKETS, np.int32), addresses={0: "local:0"}))
    ids = np.zeros(1, np.int64)
    seq = 0
    for table, config in enumerate(description.tables):
        header = Header(op=Op.PUSH, run_id=description.run_id, lease=1, table=table, dim=config.dim)
        for kind, dtype in _TYPES.items():
            seq += 1
            gradients = np.zeros((1, config.dim), dtype)
            shard.push(join([encode(header._replace(seq=seq, clock=seq), ids, gradients)]))
            shard.pull(join([encode(header._replace(op=Op.PULL, type=kind), ids)]))
        shard.changes(table, 0, np.ones(NUM_BUCKETS, np.bool_))
    shard.evict()
    shard.close()

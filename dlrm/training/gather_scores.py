"""Brings the scores that ranks have given together on the first one, in pieces that fit any memory."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from dlrm.distributed.ranks import Ranks
from dlrm.metrics.metrics import BinaryMetrics
from dlrm.metrics.score_keys import KeyFile


def gather_scores(metrics: BinaryMetrics, ranks: Ranks) -> None:
    """Add to rank 0's collector all that the others' have seen (a collective call)."""
    for file in metrics.key_files():
        for rank, count in enumerate(ranks.gather(len(file))):
            if rank == 0:
                continue
            if ranks.rank == rank:
                _send(file, ranks)
            elif ranks.is_first:
                _receive(file, rank, count, ranks)


def _send(file: KeyFile, ranks: Ranks) -> None:
    for keys in file.pieces():
        dist.send(torch.from_numpy(np.array(keys).view(np.int64)).to(ranks.device), dst=0)


def _receive(file: KeyFile, rank: int, count: int, ranks: Ranks) -> None:
    start = len(file)
    while (missing := start + count - len(file)) > 0:
        keys = torch.empty(min(missing, KeyFile.PIECE_ROWS), dtype=torch.int64, device=ranks.device)
        dist.recv(keys, src=rank)
        file.append(keys.cpu().numpy().view(np.uint64))

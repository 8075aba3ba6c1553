"""What a shard compiles before it serves is what pushes and pulls need: afterwards nothing is left to compile."""

from __future__ import annotations

import subprocess
import sys

import numba
import numpy as np
import pytest

from embeddings.kernels import hashed_row_kernels
from embeddings.row_optimizers import RowAdam, RowLamb, RowSGD
from embeddings.tables import TableConfig
from parameter_server.description import Growth, RunDescription
from parameter_server.processes.warm_up import warm_up
from parameter_server.shard import marks


def count_compiled() -> dict[str, int]:
    kernels = {**vars(hashed_row_kernels), **vars(marks)}
    return {name: len(k.signatures) for name, k in kernels.items() if isinstance(k, numba.core.dispatcher.Dispatcher)}


@pytest.mark.parametrize(
    "optimizer", [RowSGD(learning_rate=0.1), RowAdam(learning_rate=0.1), RowLamb(learning_rate=0.1)]
)
def test_a_shard_is_warm_before_it_serves(optimizer: RowSGD | RowAdam | RowLamb) -> None:
    table = TableConfig(name="t", num_rows=1, dim=3, optimizer=optimizer)
    growth = {"t": Growth(admit_after=2, evict_after_seconds=10, max_bytes=1 << 20, spill=True)}
    description = RunDescription(run_id=3, seed=1, tables=(table,), growth=growth, durability="journal")
    warm_up(description)
    before = count_compiled()
    assert before["push_rows"] > 0
    assert before["pull_rows"] > 0
    warm_up(description)
    assert count_compiled() == before
    assert np.isfinite(sum(before.values()))


def test_a_shard_has_no_need_of_torch() -> None:
    """It would double its memory and its start, once for each shard of a machine."""
    code = (
        "import sys; from parameter_server.processes import shard_process, warm_up, shard_membership, telemetry;"
        "from parameter_server.control import shard_service; from parameter_server.feed import service;"
        "from parameter_server.shard import shard; print([it for it in ('torch', 'torchrec') if it in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"

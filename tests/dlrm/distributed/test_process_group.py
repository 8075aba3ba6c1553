"""Every group of processes waits as long as the user has asked for."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from dlrm.distributed import process_group
from dlrm.distributed.parallelize import DenseReducer
from dlrm.distributed.place import Place


def test_dense_gradients_wait_as_long_as_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[timedelta | None] = []
    monkeypatch.setattr(process_group, "open_store", lambda place, **_: HashStore())
    monkeypatch.setattr(process_group, "meet", lambda store, place: "start")
    monkeypatch.setattr(process_group, "check_alike", lambda *_: None)
    monkeypatch.setattr(process_group, "leave", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout, **__: given.append(timeout))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "new_group", lambda timeout=None: given.append(timeout))
    place = Place(count=2, per_node=2)
    with process_group.join_ranks(place, torch.device("cpu"), {}, hang_timeout_seconds=7200) as group:
        DenseReducer([], group.ranks)
    assert given == [timedelta(seconds=9000)] * 2

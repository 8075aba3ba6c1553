"""Joins the ranks of a run: each learns its place, all are found to be alike, and they leave together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)  # torch.distributed gives them without types

from dlrm.distributed.place import Place
from dlrm.distributed.ranks import Ranks

MEETING_SECONDS = 600.0  # that ranks may start apart: some import slowly
POLL_SECONDS = 0.02
SAME_FLAGS = "start all ranks with the same flags"
SAME_SOFTWARE = "install the same on all machines"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that have met.

    Attributes:
        place: this process's.
        ranks: what the training loop needs to know.
        store: keys and values that all ranks see; begins empty at each start, also at a restart.
        lasting_store: the same, but an elastic agent's keeps its keys through restarts.
        open_store: makes a further connection to it, for a thread that must not wait for another's call.
    """

    place: Place
    ranks: Ranks
    store: Store
    lasting_store: Store
    open_store: Callable[[], Store]

    def wait_for(self, key: str) -> str:
        """Wait until some rank has set `key`, however long that takes, and return its value."""
        while not self.store.check([key]):
            time.sleep(POLL_SECONDS)
        return self.store.get(key).decode()

    def keep_name(self, key: str, proposal: str) -> str:
        """Return the first proposal of any rank, also after a restart by an agent."""
        return self.lasting_store.compare_set(key, "", proposal).decode()

    def check_alike(self, facts: Mapping[str, object], cure: str) -> None:
        """Check that all ranks have the same facts (a collective call).

        Raises:
            ValueError: on all ranks, naming one that differs, the fact, both values, and the cure.
        """
        check_alike(self.store, self.place, facts, cure)


@contextlib.contextmanager
def join_ranks(
    place: Place,
    device: torch.device,
    settings: Mapping[str, object],
    *,
    hang_timeout_seconds: float,
    on_meeting: Callable[[Store], None] = lambda store: None,
) -> Iterator[Group]:
    """Meet the other ranks, check that they are alike, and start the process group; leave it at the end.

    Args:
        place: of this process.
        device: where it trains; on CUDA the process gets the GPU of its place on its machine.
        settings: what must be the same on all ranks.
        hang_timeout_seconds: a collective call fails some time after it, so that a watch may tell the reason before.
        on_meeting: is given the store as soon as several ranks have met, before they are compared.

    Raises:
        ValueError: ranks differ in versions or settings, some do not come, or there are too few GPUs.
    """
    if place.count == 1:
        store: Store = HashStore()
        yield Group(place=place, ranks=Ranks(), store=store, lasting_store=store, open_store=lambda: store)
        return
    _take_gpu(place, device)
    whole = open_store(place)
    prefix = meet(whole, place)
    store = PrefixStore(prefix, whole)
    on_meeting(store)
    check_alike(store, place, describe_software() | {"device": device.type}, SAME_SOFTWARE)
    check_alike(store, place, {**settings, "ranks per machine": place.per_node}, SAME_FLAGS)
    timeout = timedelta(seconds=hang_timeout_seconds + max(30.0, hang_timeout_seconds / 4))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=place.rank,
        world_size=place.count,
        timeout=timeout,
    )
    yield Group(
        place=place,
        ranks=Ranks(rank=place.rank, count=place.count, per_node=place.per_node, timeout=timeout),
        store=store,
        lasting_store=whole,
        open_store=lambda: PrefixStore(prefix, open_store(place, is_host=False)),
    )
    leave(store, place, hang_timeout_seconds)
    dist.destroy_process_group()


def leave(store: Store, place: Place, seconds: float) -> None:
    """Wait until all ranks want to leave, so that none takes the others down; at most for so many seconds."""
    end = time.monotonic() + seconds
    with contextlib.suppress(RuntimeError):  # who kept the store has gone already
        gone = store.add("leaving", 1)
        while gone < place.count and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            gone = store.add("leaving", 0)
    if place.rank == 0 and not place.has_agent:  # it keeps the store that the others have just looked at
        time.sleep(10 * POLL_SECONDS)


def open_store(place: Place, *, is_host: bool | None = None) -> Store:
    """Connect to the store at MASTER_ADDR, MASTER_PORT: an elastic agent's, else rank 0 keeps it.

    Raises:
        ValueError: the variables are not set, or rank 0 finds the port in use.
    """
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise ValueError(
            "expected MASTER_ADDR and MASTER_PORT of the ranks' store in the environment; start ranks with torchrun, "
            "or on one machine with --ranks"
        ) from None
    if is_host is None:
        is_host = place.rank == 0 and not place.has_agent
    limit = timedelta(seconds=60 if place.has_agent else MEETING_SECONDS)  # an agent's store is there from the start
    try:
        return TCPStore(host, port, None, is_host, limit, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        if not is_host:
            raise
        told = str(error).splitlines()[0]
        raise ValueError(f"MASTER_PORT={port}: expected a free port for the ranks' store, got: {told}") from error


def meet(store: Store, place: Place, *, seconds: float = MEETING_SECONDS) -> str:
    """Wait for all ranks and return a name that this start alone has (a collective call).

    An agent's store outlives restarts with all its keys, and counts of restarts differ between machines. So rank 0
    gives the name, and each rank believes it only once it finds its own fresh number beside it.

    Raises:
        ValueError: some ranks did not come in time.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"hello/{place.rank}", own)
    others = range(1, place.count)
    shown: list[str | None] = []
    while place.rank == 0:
        present = [own, *_read(store, [f"hello/{rank}" for rank in others])]
        if present != shown:
            store.set("welcome", json.dumps(present))
            shown = present
        late = [rank for rank in others if _read(store, [f"ready/{rank}"]) != [own]]
        if not late:
            return own
        _check_time(end, late, seconds)
    while True:
        (welcome,) = _read(store, ["welcome"])
        greeted = [str(number) for number in json.loads(welcome)] if welcome else []
        if len(greeted) == place.count and greeted[place.rank] == own:
            store.set(f"ready/{place.rank}", greeted[0])
            return greeted[0]
        _check_time(end, [0], seconds)


def check_alike(
    store: Store, place: Place, facts: Mapping[str, object], cure: str, *, seconds: float = MEETING_SECONDS
) -> None:
    """Check that all ranks have the same facts (a collective call); see `Group.check_alike`.

    Raises:
        ValueError: they differ, or a rank did not answer in time.
    """
    # Named by the order of calls, which is the same everywhere.
    turn = store.add(f"checks/{place.rank}", 1)
    keys = [f"facts/{turn}/{rank}" for rank in range(place.count)]
    store.set(keys[place.rank], json.dumps(dict(facts), default=str))
    verdict, end = f"verdict/{turn}", time.monotonic() + seconds
    if place.rank == 0:
        while None in (found := _read(store, keys)):
            _check_time(end, [rank for rank, value in enumerate(found) if value is None], seconds)
        store.set(verdict, _find_difference([json.loads(value) for value in found if value], cure))
    while (said := _read(store, [verdict])[0]) is None:
        _check_time(end, [0], seconds)
    if said:
        raise ValueError(said)


def describe_software() -> dict[str, str]:
    """Return the versions that ranks must have in common; recforge's is a digest of its files."""
    digest = hashlib.sha256()
    source = Path(__file__).resolve().parents[2]
    for file in sorted([*source.glob("dlrm/**/*.py"), *source.glob("embeddings/**/*.py")]):
        digest.update(file.read_bytes())
    versions = {"Python": platform.python_version(), "recforge (digest of its source)": digest.hexdigest()[:12]}
    for name in ("torch", "torchrec", "fbgemm_gpu"):
        versions[name] = str(getattr(import_module(name), "__version__", "unknown"))
    return versions


def _find_difference(facts: Sequence[Mapping[str, Any]], cure: str) -> str:
    for rank, other in enumerate(facts):
        for name in sorted(facts[0].keys() | other.keys()):
            mine, theirs = facts[0].get(name), other.get(name)
            if mine != theirs:
                return f"rank {rank} has {name} = {theirs}, rank 0 has {mine}; {cure}"
    return ""


def _read(store: Store, keys: Sequence[str]) -> list[str | None]:
    if store.check(list(keys)):  # one question for all, as it is asked again and again
        return [value.decode() for value in store.multi_get(list(keys))]
    return [store.get(key).decode() if store.check([key]) else None for key in keys]


def _check_time(end: float, late: Sequence[int], seconds: float) -> None:
    if time.monotonic() > end:
        names = ", ".join(map(str, late))
        raise ValueError(f"expected all ranks within {seconds:g} s, waited in vain for rank {names}")
    time.sleep(POLL_SECONDS)


def _take_gpu(place: Place, device: torch.device) -> None:
    if device.type != "cuda":
        return
    if place.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"expected a GPU for each of the {place.per_node} ranks of this machine, found "
            f"{torch.cuda.device_count()}; start fewer ranks, or --step.device cpu"
        )
    torch.cuda.set_device(place.local_rank)

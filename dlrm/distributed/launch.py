"""Starts ranks on this machine through torch's elastic agent, and starts them again when one is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from dlrm.cli import ERROR, INTERRUPTED
from dlrm.distributed.one_voice import say_apart
from dlrm.this_machine import count_cores, memory_bytes

STOP_SECONDS = 600  # that ranks may take to save their state when they are asked to stop
BYTES_OF_A_RANK = 300_000_000  # of its own, with torch loaded and no table yet
FINAL = (ERROR, INTERRUPTED)  # statuses that another start would not change


def check_room(ranks: int) -> None:
    """Check that this machine's memory holds so many processes at all.

    Raises:
        ValueError: it does not.
    """
    memory = memory_bytes()
    most = max(1, memory // BYTES_OF_A_RANK)
    if ranks > most:
        raise ValueError(
            f"--ranks {ranks}: expected at most {most} in {memory / 1e9:.1f} GB of memory, as each takes "
            f"{BYTES_OF_A_RANK / 1e9:g} GB before any table"
        )


def launch_ranks(program: Sequence[str], *, ranks: int, max_restarts: int) -> int:
    """Run `python PROGRAM` in several processes, told their places by the environment; return the exit status.

    When a process is killed or fails for a reason that may pass, all are started again; what they say for themselves
    goes to this process's outputs, and nothing is added but a line for each restart.

    Args:
        program: the interpreter's arguments, as `-m dlrm train ...`.
        ranks: processes.
        max_restarts: starts after the first one.
    """
    cores = count_cores()
    # What is set by the user stays. All ranks are on this machine, whose own name need not lead anywhere.
    for name, value in (("OMP_NUM_THREADS", str(max(1, cores // ranks))), ("GLOO_SOCKET_IFNAME", "lo")):
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="recforge-") as folder, _quiet():
        handler = get_rendezvous_handler(
            RendezvousParameters(
                backend="c10d",
                endpoint="localhost:0",
                run_id=uuid.uuid4().hex,
                min_nodes=1,
                max_nodes=1,
                local_addr="localhost",
            )
        )
        spec = WorkerSpec(
            role="train",
            local_world_size=ranks,
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=tuple(program),
            max_restarts=max_restarts,
            monitor_interval=0.1,
            local_addr="localhost",
        )
        agent = _Agent(spec, logs_specs=DefaultLogsSpecs(log_dir=folder), start_method="spawn")
        try:
            agent.run()
        except SignalException as stop:
            agent.kill()
            agent.status = agent.status or (INTERRUPTED if stop.sigval in (signal.SIGINT, signal.SIGTERM) else 1)
            if INTERRUPTED not in agent.codes():  # no rank was where it could save its state and say so
                say_apart("error: interrupted; the same command continues from the last checkpoint, if there is one")
        finally:
            handler.shutdown()
        return agent.status


class _Agent(LocalElasticAgent):
    """Torch's agent, which says in one line what has happened, and does not start again what cannot succeed."""

    def __init__(self, spec: WorkerSpec, **settings: Any) -> None:
        super().__init__(spec, **settings)
        self.status = 0
        self._max_restarts = spec.max_restarts
        self._shutdown_timeout = STOP_SECONDS

    def kill(self) -> None:
        """End what is left of the processes."""
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGKILL)

    def codes(self) -> list[int | None]:
        """Return the processes' exit codes, None of one that runs."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [handler.proc.returncode for handler in handlers.values()]

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._judge({rank: failure.exitcode for rank, failure in result.failures.items()})
        elif result.state == WorkerState.SUCCEEDED:
            self.status = 0
        return result

    def _judge(self, codes: dict[int, int]) -> None:
        """Decide what follows from ranks' exit codes; who was asked to end because of another one comes after it."""
        rank, code = min(codes.items(), key=lambda item: (item[1] not in FINAL, item[1] == -signal.SIGTERM))
        if code in FINAL:
            self._remaining_restarts, self.status = 0, code  # the rank has said why
            return
        self.status = 1
        # One that ends by itself has said why.
        why = f"rank {rank} was killed by {_name(-code)}; " if code < 0 else ""
        if self._remaining_restarts > 0:
            number = self._max_restarts - self._remaining_restarts + 1
            say_apart(f"{why}all ranks start again from the last checkpoint (restart {number} of {self._max_restarts})")
        elif code < 0 or self._max_restarts:
            say_apart(f"error: {why}no restart is left (--max-restarts {self._max_restarts})")


def _name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} (as the system does when memory runs out)" if name == "SIGKILL" else name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the agent's own log back, many lines for each rank that ends; RECFORGE_TRACEBACK=1 shows it."""
    log = logging.getLogger("torch.distributed.elastic")
    former, nothing = log.propagate, logging.NullHandler()
    if os.environ.get("RECFORGE_TRACEBACK") != "1":
        log.propagate = False
        log.addHandler(nothing)
    try:
        yield
    finally:
        log.propagate = former
        log.removeHandler(nothing)

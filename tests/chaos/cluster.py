"""A run of real processes on this machine, each of which can be killed, stopped for a while, and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byte_proxy import ByteFaults, ByteProxy
from message_proxy import MessageFaults, MessageProxy

from parameter_server.description import RunDescription

TRAINER = Path(__file__).with_name("sum_trainer.py")
REPOSITORY = TRAINER.parents[2]
LEASE_SECONDS = 2.0
START_SECONDS = 60.0
COLD_SECONDS = 240.0  # until all run, where kernels are still to be compiled
STREAMS = ["/recforge.v1.ShardControl/TakeBuckets"]  # of calls to a shard, those answered with a stream
Proxy = ByteProxy | MessageProxy


class Cluster:
    """Coordinator, shards and trainers of one run.

    Args:
        folder: For their files; its path must be short, as sockets lie there.
        description: Of the run.
        seed: Of the proxies' faults.
        pace_seconds: That trainers wait after each batch, until ``hurry``.
    """

    def __init__(self, folder: Path, description: RunDescription, *, seed: int, pace_seconds: float = 0.0) -> None:
        self.folder, self.seed, self._pace_seconds = folder, seed, pace_seconds
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.proxies: dict[str, Proxy] = {}
        self._commands: dict[str, list[str]] = {}
        self._leaving: set[str] = set()
        (folder / "description.json").write_text(description.to_json())
        self.address = f"unix:{folder}/c"

    def start_coordinator(self, shards: int, *more: object) -> None:
        """Starts the coordinator of a run that waits for so many shards, with more flags."""
        flags = ["--folder", self.folder / "coordinator", "--address", self.address, "--shards", shards]
        flags += ["--lease-seconds", LEASE_SECONDS, "--snapshot-seconds", 0, *more]
        self._start("coordinator", ["-m", "deploy.cli", "ps", "coordinator", *flags])

    def start_shard(self, number: int, faults: ByteFaults | MessageFaults | None = None, *more: object) -> str:
        """Starts a shard with more flags, and with a proxy before it where there are faults."""
        name = f"shard-{number}"
        own = f"unix:{self.folder}/s{number}"
        flags: list[object] = ["--coordinator", self.address, "--folder", self.folder / name, "--name", name]
        flags += ["--address", own]
        if isinstance(faults, ByteFaults):
            self.proxies[name] = ByteProxy(own, seed=self.seed + number, faults=faults)
        elif faults is not None:
            self.proxies[name] = MessageProxy(own, seed=self.seed + number, faults=faults, streams=STREAMS)
        if name in self.proxies:
            flags += ["--advertise", self.proxies[name].address]
        flags += more
        self._start(name, ["-m", "deploy.cli", "ps", "shard", *flags])
        return name

    def start_trainer(self, number: int) -> str:
        """Starts a trainer."""
        name = f"trainer-{number}"
        flags = ["--coordinator", self.address, "--description", self.folder / "description.json"]
        flags += ["--hurry", self.folder / "hurry", "--pace-seconds", self._pace_seconds]
        self._start(name, [TRAINER, name, *flags])
        return name

    def kill_all(self) -> None:
        """Kills all processes, as a power cut does."""
        for name in list(self.processes):
            self.kill(name)

    def hurry(self) -> None:
        """Has trainers wait no longer."""
        (self.folder / "hurry").touch()

    def kill(self, name: str) -> None:
        """Kills a process, as no process can see coming."""
        self.processes[name].kill()
        self.processes[name].wait()

    def start_again(self, name: str) -> None:
        """Starts a process with the same arguments as before."""
        self._start(name, self._commands[name])

    def pause(self, name: str, seconds: float) -> None:
        """Stops a process for a while."""
        self.processes[name].send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.processes[name].send_signal(signal.SIGCONT)

    def leave(self, name: str) -> None:
        """Asks a trainer to leave, and waits for it; one that has hardly begun does not know how, and just ends."""
        self._leaving.add(name)
        self.processes[name].terminate()
        assert self.processes[name].wait(60) in (0, -signal.SIGTERM, -signal.SIGKILL), self.said(name)

    def named(self, role: str) -> list[str]:
        """Gives the names of living processes of a role."""
        return [name for name, process in self.processes.items() if name.startswith(role) and process.poll() is None]

    def check_alive(self) -> None:
        """Checks that no process has ended by itself but trainers that have finished."""
        for name, process in self.processes.items():
            code = process.poll()
            may_end = code == 0 and not name.startswith("coordinator")
            assert may_end or code in (None, -signal.SIGKILL) or name in self._leaving, self.said(name)

    def said(self, name: str) -> str:
        """Gives the end of what a process has written, and of the others."""
        statuses = {name: process.poll() for name, process in self.processes.items()}
        parts = [f"{name} ended with {statuses[name]}, seed {self.seed}, all: {statuses}"]
        for file in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)

    def wait_for_trainers(self, seconds: float) -> None:
        """Waits until all trainers that live have finished."""
        end = time.monotonic() + seconds
        while self.named("trainer"):
            self.check_alive()
            assert time.monotonic() < end, self.said(self.named("trainer")[0])
            time.sleep(0.05)
        self.check_alive()

    def close(self) -> None:
        """Ends all."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        for proxy in self.proxies.values():
            proxy.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(self.said("coordinator"))
        self.close()

    def _start(self, name: str, command: list[Any]) -> None:
        self._commands[name] = [str(word) for word in command]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *self._commands[name]], stdout=log, stderr=log, env=env
            )


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"expected {what} within {seconds} s"
        time.sleep(0.05)

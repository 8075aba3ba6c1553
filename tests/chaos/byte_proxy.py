"""A TCP or Unix relay that does to bytes whatever a network may do: resets, cuts, delays and silence, from a seed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PIECE = 16 << 10
_LINGER_NOT = struct.pack("ii", 1, 0)  # closing sends a reset


@dataclass(frozen=True, kw_only=True)
class ByteFaults:
    """What happens to connections.

    Attributes:
        reset: Share of connections which are reset after some bytes, most often in the middle of a frame.
        reset_bytes: How many bytes, at most, those let through before.
        delay: Share of pieces that wait.
        delay_seconds: How long, at most.
        bytes_per_second: Of each connection and direction; None is no limit.
        silence: Share of connections which go silent for a while, after some bytes.
        silence_seconds: How long.
        unanswered: Of connections on which these bytes have gone to the target, nothing comes back any more.
    """

    reset: float = 0.0
    reset_bytes: int = 1 << 20
    delay: float = 0.0
    delay_seconds: float = 0.05
    bytes_per_second: float | None = None
    silence: float = 0.0
    silence_seconds: float = 0.5
    unanswered: bytes = b""


class ByteProxy:
    """Relays connections to ``target`` from an address of its own, in a thread.

    Args:
        target: ``host:port`` or ``unix:/path``; may be changed for later connections.
        seed: Draws all faults: the n-th connection meets the same ones again.
        faults: May be changed; but for ``unanswered``, for later connections.
        path: Of a Unix socket to listen on; else a TCP port of its own.
    """

    def __init__(self, target: str, *, seed: int, faults: ByteFaults, path: Path | None = None) -> None:
        self.target, self.seed, self.faults, self._path = target, seed, faults, path
        self.connections = 0
        self.harmed = 0  # connections that were reset or went silent
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._is_ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="byte-proxy", daemon=True)
        self._thread.start()
        self._is_ready.wait()

    def reset_all(self) -> None:
        """Cuts every open connection, and returns when that is done."""
        is_done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (self._cut_all(), is_done.set()))
        is_done.wait()

    def close(self) -> None:
        """Ends all connections and the thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def __enter__(self) -> ByteProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve(self) -> None:
        if self._path is not None:
            server = await asyncio.start_unix_server(self._relay, self._path)
            self.address = f"unix:{self._path}"
        else:
            server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
            self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._is_ready.set()
        await self._stop.wait()
        server.close()
        self._cut_all()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _cut_all(self) -> None:
        for writer in self._open:
            _reset(writer)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        chance = random.Random(f"{self.seed} {self.connections}")
        faults = self.faults
        try:
            if self.target.startswith("unix:"):
                reader_there, writer_there = await asyncio.open_unix_connection(self.target[len("unix:") :])
            else:
                host, port = self.target.rsplit(":", 1)
                reader_there, writer_there = await asyncio.open_connection(host, int(port))
        except OSError:
            _reset(writer)
            return
        both = (writer, writer_there)
        self._open.update(both)
        limit = chance.randrange(faults.reset_bytes) if chance.random() < faults.reset else None
        silent_at = chance.randrange(faults.reset_bytes) if chance.random() < faults.silence else None
        self.harmed += limit is not None or silent_at is not None
        watch = _Watch(self)
        try:
            await asyncio.gather(
                _pass_on(reader, writer_there, random.Random(chance.random()), faults, limit, silent_at, watch.see),
                _pass_on(reader_there, writer, random.Random(chance.random()), faults, limit, silent_at, watch.lose),
            )
        except (OSError, EOFError):
            pass
        finally:
            self._open.difference_update(both)
            for one in both:
                _reset(one)


class _Watch:
    """Looks for the bytes after which a connection's answers are lost, in pieces that may cut them."""

    def __init__(self, proxy: ByteProxy) -> None:
        self._proxy, self._tail, self._is_found = proxy, b"", False

    def see(self, piece: bytes) -> bytes:
        """Looks at what goes to the target, before it does."""
        if wanted := self._proxy.faults.unanswered:
            seen = self._tail + piece
            self._is_found = self._is_found or wanted in seen
            self._tail = seen[-len(wanted) :]
        return piece

    def lose(self, piece: bytes) -> bytes:
        """Gives what is left of what comes back."""
        return b"" if self._is_found and self._proxy.faults.unanswered else piece


async def _pass_on(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    chance: random.Random,
    faults: ByteFaults,
    limit: int | None,
    silent_at: int | None,
    change: Callable[[bytes], bytes],
) -> None:
    passed = 0
    while piece := await reader.read(_PIECE):
        piece = change(piece)
        if limit is not None and passed + len(piece) > limit:
            writer.write(piece[: limit - passed])
            with contextlib.suppress(OSError):
                await writer.drain()
            raise EOFError
        if silent_at is not None and passed + len(piece) > silent_at:
            silent_at = None
            await asyncio.sleep(faults.silence_seconds)
        if chance.random() < faults.delay:
            await asyncio.sleep(chance.random() * faults.delay_seconds)
        if faults.bytes_per_second is not None:
            await asyncio.sleep(len(piece) / faults.bytes_per_second)
        passed += len(piece)
        writer.write(piece)
        await writer.drain()
    raise EOFError


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    writer.transport.abort()

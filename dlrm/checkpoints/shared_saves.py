"""Lets many ranks write one checkpoint, which is there when all of it is, and settle that over the file system alone.

Saving goes on in each rank's background thread while its main thread trains, and a collective call from there would run
in between those of the training. So the ranks meet in the folder, which all of them must share:

1. When the store is made, rank 0 removes what the dead have left and chooses a token, which it tells the others; from
   token and number every rank knows the scratch folder of each save. Ranks that do not see rank 0's folder are named.
2. Every rank writes its files into the scratch folder, syncs them, and then writes `rank-0000r.done`: names, sizes,
   checksums, and which piece of which tensor lies where. That file appears by a rename, whole.
3. Rank 0 waits for those of all others, checks that sizes hold and that the pieces make up every tensor, writes
   `state.json` and `manifest.json`, syncs, and renames the folder to the checkpoint's name. Only this makes it one.
4. `wait` returns on rank 0 after the rename, and on another rank when it sees a checkpoint whose manifest names the
   save.

A rank that fails leaves a note beside the scratch folder, and all ranks fail with its words. A rank that is killed
never is done: the scratch folder keeps its name, nobody takes it for a checkpoint, and rank 0 of the next start removes
it.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from uuid import uuid4

from dlrm.checkpoints.atomic_folder import WRITING, remove_leftovers, share_folder
from dlrm.checkpoints.checkpoint_folder import RankFiles, take_done
from dlrm.distributed.ranks import Ranks

SIGHT_SECONDS = 10.0  # in which a rank must see a folder that rank 0 has made; network file systems remember for some
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.005, 0.5


class SharedSaves:
    """The ranks' agreement on one folder's checkpoints.

    Args:
        folder: of the checkpoints.
        ranks: who writes; making this is a collective call.
        timeout_seconds: after which ranks that write nothing are given up.
        read_only: nothing is removed.

    Raises:
        ValueError: a rank does not see the folder.
    """

    def __init__(self, folder: Path, ranks: Ranks, timeout_seconds: float, *, read_only: bool = False) -> None:
        self.folder, self.ranks, self.timeout_seconds = folder, ranks, timeout_seconds
        if ranks.is_first and not read_only:
            remove_leftovers(folder)
        self.token = uuid4().hex if ranks.count == 1 else self._meet()

    def name(self, save: int) -> str:
        """Name a save, the same on every rank and like no other."""
        return f"{self.token}-{save}"

    def scratch(self, save: int) -> Path:
        """Return the folder that a save is written into."""
        return self.folder / f"{WRITING}{self.name(save)}"

    def wait_for_files(self, save: int) -> list[RankFiles]:
        """Wait, on rank 0, for what the other ranks have written.

        Raises:
            ValueError: a rank has failed.
            OSError: ranks have written nothing for too long.
        """
        found: dict[int, RankFiles] = {}
        scratch, others = self.scratch(save), range(1, self.ranks.count)

        def all_done() -> bool:
            self.raise_failure(save)
            for rank in others:
                if rank not in found and (written := take_done(scratch, rank)) is not None:
                    found[rank] = written
            return len(found) == len(others)

        if not self._poll(all_done, save):
            missing = ", ".join(str(rank) for rank in others if rank not in found)
            raise OSError(f"waited {self.timeout_seconds:g} s for rank {missing}, which has not written its part")
        return [found[rank] for rank in others]

    def wait_for_checkpoint(self, save: int, is_there: Callable[[str], bool]) -> None:
        """Wait, on another rank than 0, until rank 0 has made a checkpoint of what all have written.

        Raises:
            ValueError: a rank has failed, or rank 0 has written nothing for too long.
        """

        def decided() -> bool:
            self.raise_failure(save)
            return is_there(self.name(save))

        if not self._poll(decided, save):
            raise ValueError(
                f"rank {self.ranks.rank}: waited {self.timeout_seconds:g} s for rank 0 to complete a checkpoint in "
                f"{self.folder.absolute()}: expected it to run, and the folder to be shared by all ranks (--output)"
            )

    def tell_failure(self, save: int, why: str) -> None:
        """Leave a note for the other ranks that this one could not do its part."""
        if self.ranks.count == 1:
            return
        note = self.scratch(save).with_name(f"{self.scratch(save).name}.{self.ranks.rank}.failed")
        unfinished = note.with_suffix(".tmp")
        with suppress(OSError):
            try:
                unfinished.write_text(why, encoding="utf-8")
                unfinished.rename(note)
            except OSError:  # a full disk takes no words, but often still a name
                note.touch()

    def raise_failure(self, save: int) -> None:
        """Raise what another rank has said of its failure; nothing will come of the save then, and its files go.

        Raises:
            ValueError: a rank has failed.
        """
        for note in sorted(self.folder.glob(f"{self.scratch(save).name}.*.failed")):
            rank = note.name.split(".")[-2]
            if rank != str(self.ranks.rank):
                why = note.read_text(encoding="utf-8") or "the checkpoint was not written"
                shutil.rmtree(self.scratch(save), ignore_errors=True)
                raise ValueError(f"rank {rank}: {why}")

    def _poll(self, is_done: Callable[[], bool], save: int) -> bool:
        """Ask again and again, as long as somebody still writes; return whether it is done."""
        pause, seen = FIRST_PAUSE_SECONDS, self._progress(save)
        end = time.monotonic() + self.timeout_seconds
        while not is_done():
            if time.monotonic() > end:
                if (now := self._progress(save)) == seen:
                    return False
                seen, end = now, time.monotonic() + self.timeout_seconds
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        return True

    def _progress(self, save: int) -> list[tuple[str, int]]:
        with suppress(OSError):
            return sorted((path.name, path.stat().st_size) for path in self.scratch(save).iterdir())
        return []

    def _meet(self) -> str:
        ranks, folder = self.ranks, self.folder.absolute()
        error: ValueError | None = None
        token = uuid4().hex
        with ExitStack() as stack:
            if ranks.is_first:
                try:
                    stack.enter_context(share_folder(folder / f"{WRITING}{token}"))
                except OSError as failure:
                    error = ValueError(f"expected to make {folder}, got {failure.strerror}; choose another --output")
            token, first_folder = ranks.object_from_first((token, str(folder)))
            ranks.raise_any(error)
            if not _sees(folder / f"{WRITING}{token}"):
                error = ValueError(
                    f"rank {ranks.rank} on {socket.gethostname()} does not see the checkpoints that rank 0 keeps in "
                    f"{first_folder}, got {folder}: expected one folder that all ranks share; set --output to one"
                )
            ranks.raise_any(error)
            if ranks.is_first:
                (folder / f"{WRITING}{token}").rmdir()
        return token


def _sees(path: Path) -> bool:
    end = time.monotonic() + SIGHT_SECONDS
    while not path.is_dir():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True

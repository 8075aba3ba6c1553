"""Large tensors that are freed and made again cost no page faults once the process keeps its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from embeddings.allocation import keep_freed_memory
assert keep_freed_memory()
def work():
    for _ in range(3):
        tensors = [torch.ones(10_000_000) for _ in range(2)]
for _ in range(4):  # until the heap has found its size
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_used_again():
    def count_faults(code):
        return int(
            subprocess.run(
                [sys.executable, "-c", code],
                check=True,
                capture_output=True,
                text=True,
                env={"PYTHONPATH": ":".join(sys.path)},
            ).stdout
        )

    assert count_faults(FAULTS) < 1000
    # 3 x 2 x 40 MB in pages of 4 KiB, or a few large ones where the system gives such
    assert count_faults(FAULTS.replace("assert keep_freed_memory()", "")) > 20


HOLES = """
import psutil
from embeddings.allocation import FreeMemory, keep_freed_memory
assert keep_freed_memory()
soon, later = FreeMemory(every_seconds=0.0), FreeMemory(every_seconds=3600.0)
blocks = [bytes(100_000) for _ in range(2_000)]
kept = blocks[::20]
del blocks
sizes = [psutil.Process().memory_info().rss]
for each in (later, soon):
    each.tend()
    sizes.append(psutil.Process().memory_info().rss)
print(*sizes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_handed_back_from_between_what_is_kept_when_it_is_time_to():
    environment = {"PYTHONPATH": ":".join(sys.path)}
    shown = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True, env=environment)
    before, at_once, in_time = map(int, shown.stdout.split())
    assert before - at_once < 10_000_000
    assert before - in_time > 100_000_000


ARENAS = """
import threading
import psutil
from embeddings.allocation import share_free_memory
assert share_free_memory()
together = threading.Barrier(8)
def work():
    together.wait()
    kept.append([bytes(1000) for _ in range(100)])
    together.wait()
kept = []
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
arena = 64 << 20  # bytes of address space that each takes, and at whose multiples each begins
maps = psutil.Process().memory_maps(grouped=False)
print(sum(int(each.addr.split("-")[0], 16) % arena == 0 for each in maps if each.path == "[anon]"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_threads_share_free_memory():
    def count_arenas(code):
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONMALLOC": "malloc"}
        return int(
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
            ).stdout
        )

    shared = count_arenas(ARENAS)
    assert count_arenas(ARENAS.replace("assert share_free_memory()", "")) > shared

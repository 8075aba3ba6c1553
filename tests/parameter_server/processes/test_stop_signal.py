"""Who is asked to end before it is ready does so soon, whatever it is held up by."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HELD_UP = """
import os, signal, time
from parameter_server.processes import stop_signal
stop_signal.AT_ONCE_SECONDS = 0.2
with stop_signal.StopSignal(at_once=True) as stop:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    except KeyboardInterrupt:  # as a compiler's callback swallows it
        pass
    {then}
    time.sleep({seconds})
print("in good order", stop.requested)
"""


@pytest.mark.parametrize(
    ("then", "seconds", "status", "said"),
    [("pass", 30, 130, ""), ("stop.at_once = False", 0.5, 0, "in good order True\n"), ("pass", 0, 0, None)],
    ids=["swallowed", "ready by then", "ended by then"],
)
def test_an_interrupt_that_is_swallowed_ends_the_process(then: str, seconds: float, status: int, said: str) -> None:
    began = time.monotonic()
    code = HELD_UP.format(then=then, seconds=seconds)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25, check=False)
    assert ended.returncode == status, ended.stderr
    assert time.monotonic() - began < 20
    assert said is None or ended.stdout == said
    assert ("interrupted before it was ready" in ended.stderr) == bool(status)

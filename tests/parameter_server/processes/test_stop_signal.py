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


def end_with(code: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that is asked to end after a moment, and gives what it leaves."""
    begin = """
import os, signal, threading, time
from parameter_server.processes import stop_signal
stop_signal.AT_ONCE_SECONDS = 0.5
asked = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
asked.daemon = True
"""
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=60, check=False)


def test_who_is_deep_in_a_compiler_ends_soon_too() -> None:
    began = time.monotonic()
    ended = end_with("""
import hashlib
with stop_signal.StopSignal(at_once=True):
    asked.start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # many minutes without a look at signals
""")
    assert (ended.returncode, ended.stdout) == (130, ""), ended.stderr
    assert ended.stderr == "recforge: error: interrupted before it was ready\n"
    assert time.monotonic() - began < 30


def test_an_error_of_whom_was_interrupted_is_an_interrupt() -> None:
    ended = end_with("""
try:
    with stop_signal.StopSignal(at_once=True):
        asked.start()
        try:
            time.sleep(30)
        except KeyboardInterrupt:  # as a compiler's callback swallows it
            raise RuntimeError("no compiled object yet")
except KeyboardInterrupt as interrupt:
    print(interrupt, "as", repr(interrupt.__cause__))
try:
    with stop_signal.StopSignal(at_once=True):
        raise RuntimeError("its own")
except RuntimeError as error:
    print(error)
print(threading.active_count(), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.set_wakeup_fd(-1))
""")
    assert ended.stdout.splitlines() == [
        "before it was ready as RuntimeError('no compiled object yet')",
        "its own",
        "1 True -1",
    ], ended.stderr

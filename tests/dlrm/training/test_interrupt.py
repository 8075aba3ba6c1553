"""One request to stop is one, however many signals it comes in; a later one is another."""

from __future__ import annotations

import os
import signal

import pytest

from dlrm.training.interrupt import StopRequest
from parameter_server.processes import stop_signal


def test_a_ctrl_c_that_a_launcher_passes_on_is_the_same_request() -> None:
    with StopRequest() as request:
        assert not request.requested
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert request.requested


def test_asking_again_later_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signal, "SECONDS_OF_ONE_REQUEST", 0.0)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)

"""Events are one line each, whoever reads them, and carry what they were given."""

from __future__ import annotations

import json
import logging
import re

import pytest

from parameter_server.processes.logs import LogFormat, events_written

LOG = logging.getLogger("parameter_server.test")


def written(form: LogFormat, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with events_written(form, "shard-3") as events:
        events.run = 7
        LOG.info("snapshot\n%d", 5, extra={"event": "snapshot", "seconds": 0.25, "run": "given"})
        LOG.debug("nobody reads this")
        logging.getLogger("somebody.else").info("nor this")
        try:
            raise KeyError("row\n3")
        except KeyError:
            LOG.exception("a call failed")
    LOG.info("closed by now")
    return capsys.readouterr().err.splitlines()


def test_events_as_json_have_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = [json.loads(line) for line in written("json", capsys)]
    assert first.pop("time") > 1e9
    assert first == {
        "level": "info",
        "member": "shard-3",
        "run": 7,
        "event": "snapshot",
        "message": "snapshot 5",
        "seconds": 0.25,
        "run_": "given",
    }
    assert (second["level"], second["event"]) == ("error", "test")
    assert second["message"] == r"a call failed: KeyError: 'row\n3'"
    assert second["traceback"].startswith("Traceback (most recent call last):")
    assert 'raise KeyError("row' in second["traceback"]
    assert "traceback" not in first


def test_events_for_people_are_lines_like_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = written("text", capsys)
    assert first == "recforge: shard-3: snapshot 5"
    assert re.fullmatch(r"recforge: shard-3: error: a call failed: KeyError: 'row\\n3' \(test_logs.py:\d+\)", second)


def test_levels_are_as_before_afterwards() -> None:
    before = logging.getLogger("parameter_server").level, len(logging.getLogger().handlers)
    with events_written("json", "a"):
        pass
    assert (logging.getLogger("parameter_server").level, len(logging.getLogger().handlers)) == before

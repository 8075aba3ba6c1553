"""One event per line: for people, or as JSON for programs that collect the lines of all members."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

LogFormat = Literal["text", "json"]

# Whose events are written from INFO on; others' from WARNING on.
_OURS = ("parameter_server", "dlrm")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "event"}


class EventFormatter(logging.Formatter):
    """Writes an event; ``extra`` of the logging call gives its name (``event``) and its fields.

    Args:
        form: Text has the message, and of an error where it was raised; JSON has all fields and the traceback.
        member: Whose events these are.

    Attributes:
        run: Number of the run, once it is known.
    """

    def __init__(self, form: LogFormat, member: str) -> None:
        super().__init__()
        self._form = form
        self._member = member
        self.run: int | None = None

    def format(self, record: logging.LogRecord) -> str:
        """Gives the event's line, without its end."""
        message = " ".join(record.getMessage().split())
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            message += f": {type(error).__name__}: {' '.join(str(error).split())}"
            if self._form == "text":
                message += _where(error)
        if self._form == "text":
            level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
            return f"recforge: {self._member}: {level}{message}"
        event: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "member": self._member,
            "run": self.run,
            "event": getattr(record, "event", record.name.rpartition(".")[2]),
            "message": message,
        }
        if error is not None:
            event["traceback"] = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        # Who has given a field of such a name means something else by it.
        event |= {f"{name}_" if name in event else name: value for name, value in fields.items()}
        return json.dumps(event, default=str)

    def tell_ready(self, address: str) -> None:
        """Prints one line to the standard output, for whoever waits for this process to answer calls."""
        facts = {"name": __name__, "event": "ready", "address": address, "levelno": logging.INFO, "levelname": "INFO"}
        ready = logging.makeLogRecord({"msg": f"ready on {address}", **facts})
        print(f"ready on {address}" if self._form == "text" else self.format(ready), flush=True)


def _where(error: BaseException) -> str:
    """Names the place where an error was raised: file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


@contextmanager
def events_written(form: LogFormat, member: str) -> Iterator[EventFormatter]:
    """Has this process's events written to its standard error as long as this is open."""
    formatter, handler = EventFormatter(form, member), logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in _OURS]
    former = [logger.level for logger in ours]
    root.addHandler(handler)
    for logger in ours:
        logger.setLevel(logging.INFO)
    try:
        yield formatter
    finally:
        root.removeHandler(handler)
        for logger, level in zip(ours, former, strict=True):
            logger.setLevel(level)

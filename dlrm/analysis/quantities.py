"""Writes quantities the way people read them: thousands set apart, units that fit the size."""

from __future__ import annotations

from typing import Any

from embeddings.planning import task

UNKNOWN = "-"


def format_count(number: float | None) -> str:
    """Write a whole number with its thousands set apart."""
    return UNKNOWN if number is None else f"{number:,.0f}"


def format_number(number: float | None, digits: int = 4) -> str:
    """Write a number with so many digits behind the point."""
    return UNKNOWN if number is None else f"{number:,.{digits}f}"


def format_share(share: float | None, digits: int = 1) -> str:
    """Write a share of 1 in percent."""
    return UNKNOWN if share is None else f"{100 * share:.{digits}f} %"


def format_bytes(count: float | None) -> str:
    """Write a number of bytes with three digits, in powers of 1,000."""
    return UNKNOWN if count is None else task.format_bytes(count)


def format_duration(seconds: float | None) -> str:
    """Write seconds as at most two of days, hours, minutes and seconds."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part} {part_name}"
    return f"{whole} s"


def format_setting(value: Any) -> str:
    """Write the value of a setting as it would be typed."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(format_setting, value)) or "none"
    return str(value)

"""Pages that are one HTML file each: everything they need is inside, and they are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from dlrm.analysis.charts import GREY

TEMPLATES = Path(__file__).parent / "page"


def render_page(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Fill in a template that extends `page.html`.

    Args:
        template: its file.
        filters: by the name that it calls them.
        values: of its variables.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    page = environment.get_template(template.name)
    return page.render(written_by=_name_version(), plotly_js=get_plotlyjs(), grey=GREY, **values)


def write_page(text: str, output: Path) -> None:
    """Write a page to its place, whole or not at all."""
    scratch = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, output)
    finally:
        scratch.unlink(missing_ok=True)


def _name_version() -> str:
    try:
        return f"recforge {version('recforge')}"
    except PackageNotFoundError:
        return "recforge"

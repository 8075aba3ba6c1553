"""Tables to plan, drawn at random or made to measure."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from embeddings import RowWiseAdagrad, TableConfig


@pytest.fixture(scope="session")
def make_table() -> Callable[..., TableConfig]:
    """Describe a table with row-wise Adagrad."""

    def make(name: str = "t", *, num_rows: int = 100_000, dim: int = 16, **settings: object) -> TableConfig:
        settings.setdefault("optimizer", RowWiseAdagrad(learning_rate=0.1))
        return TableConfig(name=name, num_rows=num_rows, dim=dim, **settings)

    return make

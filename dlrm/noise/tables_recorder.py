"""Keeps, for one step, what tables were asked for and the gradient of what they gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dlrm.noise.frequency_bands import FrequencyBands
from dlrm.noise.table_gradients import PooledGradient, TableSquares, find_entries, measure_entries
from embeddings.interface import Tables
from embeddings.jagged import read_jagged


@dataclass(eq=False)
class TablesRecorder:
    """Keeps, for one step, what tables were asked for and the gradient of what they gave.

    Attributes:
        tables: that give one vector per bag.
        bands: of the tables' rows.
        calls: in this step; of more than one nothing is known.
    """

    tables: Tables
    bands: FrequencyBands
    calls: int = 0
    features: Any = None
    delta: Tensor | None = None
    handle: RemovableHandle | None = None

    def open(self) -> None:
        """Record the next step."""
        self.close()
        self.handle = self.tables.register_forward_hook(self._keep)

    def close(self) -> None:
        """Record no longer, and forget."""
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.calls, self.features, self.delta = None, 0, None, None

    @property
    def is_complete(self) -> bool:
        """Whether the step has told all that is needed."""
        return self.calls == 1 and self.delta is not None

    @torch.no_grad()
    def measure(self) -> list[TableSquares]:
        """Return the sums of every table, in the order of `table_configs`, of the loss that backward was called on."""
        assert self.delta is not None, "asked only where is_complete"
        tables, batch = self.tables, read_jagged(self.features, self.tables.feature_names)
        vectors = PooledGradient(self.delta, tables.feature_dims)
        found = []
        for number, config in enumerate(tables.table_configs):
            own = [feature for feature, table in enumerate(tables.feature_tables) if table == number]
            entries = find_entries(batch, own, vectors.of(own), mean=config.pooling == "mean")
            found.append(measure_entries(entries, self.bands.of(config.name)))
        return found

    def _keep(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = output.values()
        if not (module.training and isinstance(values, Tensor) and values.requires_grad):
            return
        self.calls, self.features = self.calls + 1, inputs[0]
        values.register_hook(self._keep_delta)

    def _keep_delta(self, gradient: Tensor) -> None:
        self.delta = gradient.detach().float()

"""Measures one step's gradients by group: norms of the samples' gradients and of their sum, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.noise.dense_recorder import DenseRecorder
from dlrm.noise.frequency_bands import ONE_BAND, FrequencyBands
from dlrm.noise.noise_scale import GradientSums
from dlrm.noise.table_gradients import TableSquares
from dlrm.noise.tables_recorder import TablesRecorder
from embeddings.interface import Tables

DENSE, TABLES, TABLE, BAND = "dense", "tables", "table/", "ids/"

Precondition = Callable[[nn.Parameter], Tensor]

_ZERO, _UNKNOWN = torch.zeros((), dtype=torch.float64), torch.full((), torch.nan, dtype=torch.float64)


class ProductSums(NamedTuple):
    """How the samples' dense gradients g_i lie to their mean g; sums over all ranks.

    Attributes:
        samples: of the step.
        products: sum of <g_i, g>.
        squared_products: sum of <g_i, g>^2.
        squares: sum of |g_i|^2.
        squared_norm: |g|^2.
    """

    samples: float
    products: float
    squared_products: float
    squares: float
    squared_norm: float


class Measured(NamedTuple):
    """What one step has told.

    Attributes:
        groups: `dense` and its parts, `tables`, `table/<name>`, and `ids/<band>` by the ids' frequency.
        products: None where they were not asked for.
    """

    groups: dict[str, GradientSums]
    products: ProductSums | None = None


class GradientMeter:
    """Measures the gradients of steps that are announced; the others cost nothing.

    Between `open` and `finish`, one forward and one backward pass are made. What is known of a sample comes from these:
    no gradient of a single sample is ever made. All ranks call alike.

    Of tables, no rank has the sum of all samples' gradients; each contributes the products of its own samples.

    Args:
        model: with tables, a dense part or both.
        ranks: who else trains.
        bands: of the tables' rows by frequency.

    Attributes:
        left_out: names of dense parameters whose samples' gradients are not known -> how many numbers they have.
        failure: why the last step was not measured by this rank, None if it was.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks = ALONE,
        *,
        bands: FrequencyBands = ONE_BAND,
    ) -> None:
        self.ranks, self.bands = ranks, bands
        self.dense = DenseRecorder(model)
        found = [module for module in model.modules() if isinstance(module, Tables)]
        self.tables = [TablesRecorder(tables, bands) for tables in found]
        self.left_out = self.dense.left_out
        self.failure: str | None = None

    def open(self) -> None:
        """Record the next step."""
        self.dense.open()
        for tables in self.tables:
            tables.open()

    def close(self) -> None:
        """Record no longer, and forget."""
        self.dense.close()
        for tables in self.tables:
            tables.close()

    @torch.no_grad()
    def finish(
        self, samples: int, global_size: int, *, products: bool = False, precondition: Precondition | None = None
    ) -> Measured:
        """Return what the step has told, the same on all ranks, and forget it (a collective call).

        Dense gradients are sums over ranks by now. A part of the model that was not used, or more than once, gives sums
        that are not numbers.

        Args:
            samples: of this rank.
            global_size: samples over all ranks, over which the loss was a mean.
            products: also measure how the samples' dense gradients lie to their mean.
            precondition: what a dense parameter's gradients are multiplied with, number by number.
        """
        self.failure = None
        parts = dict.fromkeys(recorded.group for recorded in self.dense.modules)
        products = products and bool(parts)
        scale = float(global_size)  # a sample's gradient is that of its own loss
        try:
            own = self._measure(samples, scale, products, precondition)
        except Exception as error:  # no run ends for want of a measurement, and the other ranks wait for this one
            self.failure = " ".join(f"{type(error).__name__}: {error}".split())
            own = [float("nan")] * self._count_numbers(len(parts), products)
        finally:
            self.close()
        total = iter(self.ranks.sum(own))
        count, pairs = next(total), next(total)
        squares, wholes = ([next(total) for _ in parts] for _ in range(2))
        groups = {
            name: GradientSums(count, count * (count - 1.0), *both)
            for name, *both in zip(parts, squares, wholes, strict=True)
        }
        groups |= {DENSE: _add_up(list(groups.values()))} if groups else {}
        groups |= self._read_tables(total, count, pairs)
        if not products:
            return Measured(groups)
        dense = groups[DENSE]
        found = ProductSums(count, next(total), next(total), dense.squares, dense.squared_sums / scale**2)
        return Measured(groups, found)

    def _measure(self, samples: int, scale: float, products: bool, precondition: Precondition | None) -> list[float]:
        """Return the numbers that are summed over ranks.

        All ranks know |sum g_i|^2 of the dense part's parts, but perhaps not to the last bit: each gives its share.
        """
        squares, whole = self._measure_dense(samples, scale, precondition)
        numbers = [torch.tensor([samples, samples * (samples - 1.0)], dtype=torch.float64), *squares.values()]
        numbers += [square / self.ranks.count for square in whole.values()]
        numbers += [part for table in self._measure_tables(samples, scale) for part in table]
        numbers += self._measure_products(samples, scale) if products else []
        own: list[float] = torch.cat([number.cpu().double().view(-1) for number in numbers]).tolist()
        return own

    def _count_numbers(self, parts: int, products: bool) -> int:
        tables = sum(len(recorder.tables.table_configs) for recorder in self.tables)
        return 2 + 2 * parts + 2 * self.bands.count * tables + 2 * products

    def _measure_dense(
        self, samples: int, scale: float, precondition: Precondition | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return, by part of the model, sum |g_i|^2 over this rank's samples and |sum g_i|^2 over all ranks'."""
        own: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for recorded in self.dense.modules:
            weights = None if precondition is None else [precondition(p) for p in recorded.rule.parameters]
            squares = _ZERO if not samples else recorded.sum_of_squares(weights) if recorded.is_complete else _UNKNOWN
            own[recorded.group] = own.get(recorded.group, _ZERO) + scale**2 * squares.double().cpu()
            gradient = recorded.gradient_square(weights).double().cpu()
            whole[recorded.group] = whole.get(recorded.group, _ZERO) + scale**2 * gradient
        return own, whole

    def _measure_tables(self, samples: int, scale: float) -> list[TableSquares]:
        """Return the sums of this rank's samples, by table."""
        found: list[TableSquares] = []
        for recorder in self.tables:
            if samples and recorder.is_complete:
                found += [TableSquares(*(scale**2 * part for part in table)) for table in recorder.measure()]
            else:
                nothing = torch.full((self.bands.count,), torch.nan if samples else 0.0)
                found += [TableSquares(nothing, nothing) for _ in recorder.tables.table_configs]
        return found

    def _measure_products(self, samples: int, scale: float) -> list[Tensor]:
        """Return the sums of <g_i, g> and of its square, over this rank's samples."""
        if not samples:
            return [torch.zeros(2)]
        modules = self.dense.modules
        if not all(recorded.is_complete for recorded in modules):
            return [torch.full((2,), torch.nan)]
        products = scale * torch.stack([recorded.products().double() for recorded in modules]).sum(dim=0)
        return [products.sum(), products.square().sum()]

    def _read_tables(self, total: Iterator[float], count: float, pairs: float) -> dict[str, GradientSums]:
        """Read the sums of all tables, in the order in which `_measure` gives them, into groups."""
        by_band: dict[str, list[GradientSums]] = {}
        for recorder in self.tables:
            for config in recorder.tables.table_configs:
                squares, sums = ([next(total) for _ in range(self.bands.count)] for _ in range(2))
                by_band[config.name] = [GradientSums(count, pairs, *both) for both in zip(squares, sums, strict=True)]
        groups = {TABLE + name: _add_up(bands) for name, bands in by_band.items()}
        groups |= {TABLES: _add_up(list(groups.values()))} if groups else {}
        for number, band in enumerate(self.bands.names if by_band else ()):
            groups[BAND + band] = _add_up([bands[number] for bands in by_band.values()])
        return groups


def _add_up(parts: list[GradientSums]) -> GradientSums:
    """Return the sums of several groups of parameters as one."""
    return GradientSums(
        parts[0].samples,
        parts[0].pairs,
        math.fsum(part.squares for part in parts),
        math.fsum(part.squared_sums for part in parts),
    )

"""The truth behind the synthetic click log: how popular each id is, when, and what makes somebody click."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from dlrm.data.schema import FIRST_ID_ROW, MISSING_ROW, OUT_OF_VOCABULARY_ROW

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Doubles: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Bools: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"
Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"

DAYS = 10.0
RANK = 2  # dimensions of the space in which the two ids of an interaction meet
MIN_COUNT = 2  # an id expected less often than this in the training part has no row of its own, as in `prepare`
HALF_EFFECT = 1e-3  # popularity at which an id's effect has half the variance of a popular one's
DRIFT, NEWBORN = 0.5, 0.1  # deviation of the change of log popularity in DAYS; share of ids that appear on the way
ALWAYS_THERE = 10  # the most popular ids of a column do not appear on the way
INTERCEPT, TREND = -1.7, 0.6


@dataclass(frozen=True, kw_only=True)
class Column:
    """A categorical column of the log.

    Attributes:
        name: of the feature.
        ids: how many there are.
        zipf: id r has popularity proportional to (r + 2) ** -zipf, before drift.
        weight: standard deviation of the ids' own effects, in logits.
        missing: share of rows without a value.
        mean_length: ids per row, for a list column.
    """

    name: str
    ids: int
    zipf: float = 1.1
    weight: float = 0.1
    missing: float = 0.0
    mean_length: float | None = None


@dataclass(frozen=True, kw_only=True)
class Number:
    """A numeric column: floor(exp(mu + sigma z)), z normal; effects in logits of its standardised log1p.

    Attributes:
        name: of the column.
        mu: mean of the logarithm.
        sigma: its standard deviation.
        slope: linear effect.
        bend: quadratic effect.
        missing: log-odds that it is absent at z = 0, or None if it never is; they grow with z.
    """

    name: str
    mu: float
    sigma: float
    slope: float = 0.0
    bend: float = 0.0
    missing: float | None = None


COLUMNS = (
    Column(name="user", ids=100_000, zipf=1.05, weight=0.3),
    Column(name="user_segment", ids=105, weight=0.25, missing=0.03),
    Column(name="interests", ids=300, weight=0.3, missing=0.05, mean_length=4),
    Column(name="recent_items", ids=20_000, zipf=1.2, weight=0.2, missing=0.1, mean_length=6),
    Column(name="publisher", ids=1_460, weight=0.35),
    Column(name="site_section", ids=583, weight=0.2),
    Column(name="referrer", ids=90_000, zipf=1.2, missing=0.25),
    Column(name="search_terms", ids=12_000, zipf=1.15, weight=0.2, missing=0.4, mean_length=3),
    Column(name="advertiser", ids=3_194, weight=0.3),
    Column(name="campaign", ids=12_500, zipf=1.15, weight=0.3),
    Column(name="creative", ids=40_000, zipf=1.15, weight=0.2),
    Column(name="item", ids=60_000, zipf=1.15, weight=0.3),
    Column(name="item_category", ids=120, weight=0.25),
    Column(name="item_brand", ids=5_600, weight=0.2, missing=0.05),
    Column(name="device_type", ids=4, weight=0.2),
    Column(name="device_model", ids=5_000, zipf=1.15, missing=0.02),
    Column(name="operating_system", ids=24, missing=0.02),
    Column(name="browser", ids=40),
    Column(name="language", ids=60, zipf=1.3, missing=0.03),
    Column(name="country", ids=200, zipf=1.3, weight=0.15),
    Column(name="city", ids=15_000),
    Column(name="carrier", ids=305, zipf=1.2, missing=0.45),
    Column(name="ad_slot", ids=27, weight=0.25),
    Column(name="ad_size", ids=18, weight=0.15),
    Column(name="connection", ids=3),
    Column(name="hour", ids=24, zipf=0.0, weight=0.2),
)
CLOCK = "hour"  # this column is read off the clock instead of drawn
PAIRS = (
    ("user_segment", "item_category", 0.65),
    ("publisher", "ad_slot", 0.6),
    ("interests", "item_category", 0.5),
    ("country", "advertiser", 0.45),
    ("device_type", "hour", 0.35),
)
NUMBERS = (
    Number(name="views_hour", mu=0.5, sigma=1.0, slope=0.15),
    Number(name="views_day", mu=1.5, sigma=1.2, slope=0.1),
    Number(name="views_week", mu=3.0, sigma=1.3, bend=-0.08),
    Number(name="clicks_day", mu=-0.5, sigma=1.2, slope=0.2),
    Number(name="clicks_week", mu=0.5, sigma=1.3, slope=0.2),
    Number(name="seconds_since_view", mu=6.0, sigma=2.0, slope=-0.15, missing=-1.0),
    Number(name="session_seconds", mu=4.0, sigma=1.2, bend=-0.1),
    Number(name="item_views_day", mu=5.0, sigma=1.5, slope=0.05, missing=-3.0),
    Number(name="item_price", mu=3.0, sigma=1.0, slope=-0.15, missing=-2.0),
    Number(name="item_age_days", mu=3.0, sigma=1.3, slope=-0.1, missing=-3.0),
    Number(name="user_age_days", mu=5.0, sigma=1.2, bend=0.05, missing=-0.5),
    Number(name="page_depth", mu=1.0, sigma=0.7, slope=-0.1),
    Number(name="text_length", mu=6.5, sigma=0.8, missing=-1.5),
)
NUMBER_PAIRS = (("item_price", "clicks_week", 0.25), ("session_seconds", "page_depth", 0.2))
MISSING_EFFECT = -0.2


class Vocabulary:
    """The ids of one column: their popularity at any time, their rows in a table, and their effects.

    All of it is a pure function of (seed, column), so that processes and files agree without talking. Effects are
    scaled so that a logit's variance due to a column does not depend on the seed, and centred so that an interaction
    is invisible to a model without interactions.

    Args:
        column: what to draw.
        index: place among the columns.
        seed: of the world.
        num_train: rows of the training part.
        train_share: of DAYS.
        max_ids: fewer ids than the column has, for small logs.
    """

    def __init__(
        self, column: Column, index: int, *, seed: int, num_train: int, train_share: float, max_ids: int
    ) -> None:
        self.column = column
        self.ids = min(column.ids, max_ids)
        rng = np.random.default_rng([seed, 1, index])
        self._popularity = (np.arange(self.ids) + 2.0) ** -column.zipf
        self._popularity /= self._popularity.sum()
        self._drift = DRIFT * rng.standard_normal(self.ids)
        newborn = (rng.random(self.ids) < NEWBORN) & (np.arange(self.ids) >= ALWAYS_THERE)
        self._birth = np.where(newborn, rng.random(self.ids), 0.0)
        self._num_train, self._train_share = num_train, train_share
        length = 1.0 if column.mean_length is None else column.mean_length
        self._frequency = np.append(self._popularity * (1 - column.missing) * length, column.missing)
        self.own = self.draw_effects(rng, 1)[:, 0] * np.float32(column.weight)

    def draw_effects(self, rng: np.random.Generator, width: int) -> Floats:
        """Return [ids + 1, width] effects, the last for a missing value; over rows of the log mean 0, variance 1."""
        effects = rng.standard_normal((self.ids + 1, width))
        known = np.append(self._popularity, self.column.missing)
        effects *= np.sqrt(known / (known + HALF_EFFECT))[:, None]
        effects -= self._frequency @ effects / self._frequency.sum()
        effects /= np.sqrt(self._frequency @ effects**2)
        return effects.astype(np.float32)

    def popularity(self, when: float) -> Doubles:
        """Return the ids' probabilities after this share of DAYS."""
        weights = self._popularity * np.exp(self._drift * (when - 0.5)) * (self._birth <= when)
        return np.asarray(weights / weights.sum())

    @cached_property
    def row_of_id(self) -> Rows:
        """The table's row of each id, the most popular first; the last entry is that of a missing value."""
        if self.column.name == CLOCK:
            return np.append(np.arange(self.ids) + FIRST_ID_ROW, MISSING_ROW).astype(np.int32)
        moments = (np.arange(16) + 0.5) / 16 * self._train_share
        expected = np.mean([self.popularity(moment) for moment in moments], axis=0)
        frequent = np.flatnonzero(expected * self._frequency[:-1].sum() * self._num_train >= MIN_COUNT)
        rows: Rows = np.full(self.ids + 1, OUT_OF_VOCABULARY_ROW, dtype=np.int32)
        rows[frequent[np.argsort(-expected[frequent], kind="stable")]] = np.arange(len(frequent)) + FIRST_ID_ROW
        rows[-1] = MISSING_ROW
        return rows

    @property
    def num_rows(self) -> int:
        """Rows of a table for this column."""
        return max(int(self.row_of_id.max()) + 1, FIRST_ID_ROW)


def draw_numbers(rng: np.random.Generator, rows: int) -> Floats:
    """Return [rows, len(NUMBERS)] log1p of correlated counts; NaN where missing, more often where the count is high."""
    shared = rng.standard_normal((rows, 1), dtype=np.float32)
    z = 0.5 * shared + np.sqrt(0.75, dtype=np.float32) * rng.standard_normal((rows, len(NUMBERS)), dtype=np.float32)
    mu, sigma = (np.array([getattr(number, name) for number in NUMBERS], dtype=np.float32) for name in ("mu", "sigma"))
    values = np.log1p(np.floor(np.exp(mu + sigma * z)))
    for index, number in enumerate(NUMBERS):
        if number.missing is not None:
            absent = rng.random(rows, dtype=np.float32) < 1 / (1 + np.exp(-number.missing - z[:, index]))
            values[absent, index] = np.nan
    return np.asarray(values, dtype=np.float32)


def numeric_logits(standardised: Floats, absent: Bools) -> Floats:
    """Return what the numeric columns ([rows, len(NUMBERS)], 0 where absent) add to the logit of each row."""
    slope, bend = (
        np.array([getattr(number, name) for number in NUMBERS], dtype=np.float32) for name in ("slope", "bend")
    )
    bent = np.minimum(standardised**2, 4.0) - 1
    logits = standardised @ slope + np.where(absent, 0, bent) @ bend
    logits += MISSING_EFFECT * absent[:, [bool(number.slope) for number in NUMBERS]].sum(axis=1)
    places = {number.name: index for index, number in enumerate(NUMBERS)}
    for first, second, weight in NUMBER_PAIRS:
        logits += weight * np.tanh(standardised[:, places[first]]) * np.tanh(standardised[:, places[second]])
    return logits.astype(np.float32)


def base_logits(when: Doubles) -> Floats:
    """Return the logit that all rows have in common after these shares of DAYS: clicks become rarer."""
    return np.asarray(INTERCEPT + TREND * (0.5 - when), dtype=np.float32)

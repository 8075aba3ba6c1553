"""Says what a column is, beside label and time: of no use, a quantity, ids, or lists of ids."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa

from dlrm.data.column_sample import ColumnSample, find_shared_values
from dlrm.data.schema import CategoricalColumn, NumericColumn

OF_IDENTITY = """
id code zip zipcode post postal postcode type category cat class gender sex country city region state site app device
user item ad campaign brand shop store seller page domain os browser lang language weekday dow hour month day week
year slot position group cluster segment flag is has
"""
OF_QUANTITY = """
count cnt num number price cost amount age score rate ratio average avg mean sum total duration length size width height
weight distance latitude lat longitude lon income salary view visit percent share discount
"""
IDENTITY, QUANTITY = frozenset(OF_IDENTITY.split()), frozenset(OF_QUANTITY.split())
LISTS = frozenset(("genre", "tag", "category", "categories", "keyword", "topic", "list", "ids", "history", "interest"))
SEPARATORS = ("|", ",", ";", " ")
LOOK_AT_TEXTS = 10_000
FEW = 10  # whole numbers with so few values are taken for ids
HASH_ABOVE, HASH_ROWS = 1_000_000, 1_000_000
SKEWED = 5.0  # a range so many times as wide as the middle half asks for a logarithm


def find_words(name: str) -> set[str]:
    """Return the words of a name, `user_ids` or `userIds`, in lower case, plural and singular."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    return {*words, *(word.removesuffix("s") for word in words if len(word) > 2)}


def find_fault(sample: ColumnSample) -> str | None:
    """Return why a column is of no use; None if it is of use."""
    if not len(sample.there):
        return "it has no values"
    if sample.is_time:
        return "it is a second column of time"
    if sample.distinct == 1:
        return "it has one value only"
    if sample.is_list and pa.types.is_floating(sample.there.flatten().type):
        return "it holds lists of decimal numbers, which are neither ids nor one number"
    numbers = sample.numbers is not None and not sample.is_whole
    if sample.is_unique and not numbers and not (QUANTITY & find_words(sample.name)):
        return "no value comes twice in its lists" if sample.is_list else "every row has another value"
    return None


def is_quantity(sample: ColumnSample) -> bool:
    """Return whether a column's size means something, rather than which value it is."""
    if sample.declared:
        return sample.declared == "float"
    if sample.numbers is None:
        return False
    if not sample.is_whole:
        return True
    if sample.distinct <= 2 or IDENTITY & find_words(sample.name):
        return False
    return bool(QUANTITY & find_words(sample.name)) or (sample.distinct > FEW and float(sample.numbers.min()) <= FEW)


def describe_number(sample: ColumnSample) -> NumericColumn:
    """Return how a column of numbers is encoded: by a logarithm where few values lie far out."""
    numbers = sample.numbers
    skewed = True
    if numbers is not None:
        low, quarter, three_quarters, high = np.quantile(numbers, (0, 0.25, 0.75, 1))
        skewed = high - low > SKEWED * max(three_quarters - quarter, 1e-12)
    return NumericColumn(
        name=sample.name,
        transform="log1p_standardise" if skewed else "standardise",
        missing_indicator=sample.missing_share > 0.01,
    )


def describe_ids(sample: ColumnSample) -> CategoricalColumn:
    """Return how a column of ids is encoded: by hashing where there are very many."""
    separator = _find_separator(sample)
    many = sample.estimate_distinct() > HASH_ABOVE
    return CategoricalColumn(
        name=sample.name,
        ids="hash" if many else "dictionary",
        num_rows=HASH_ROWS if many else None,
        is_list=sample.is_list or separator is not None,
        separator=separator,
    )


def _find_separator(sample: ColumnSample) -> str | None:
    if sample.declared == "token_seq":
        return " "
    if not sample.is_text or sample.declared:
        return None
    texts = [text for text in sample.there[:LOOK_AT_TEXTS].to_pylist() if text]
    for separator in SEPARATORS:
        share, distinct, pieces = find_shared_values(texts, separator)
        by_name = bool(LISTS & find_words(sample.name)) and share > 0.05
        by_shape = separator != " " and share > 0.2 and pieces < distinct / 2
        if by_name or by_shape:
            return separator
    return None


def describe_sample(sample: ColumnSample, separator: str | None) -> str:
    """Return a remark on a column for the reader of the configuration."""
    missing = f", {sample.missing_share:.0%} missing" if sample.missing_share >= 0.005 else ""
    if sample.numbers is not None and not IDENTITY & find_words(sample.name):
        return f"{sample.numbers.min():.12g} ... {sample.numbers.max():.12g}{missing}"
    if separator is not None:
        _, _, pieces = find_shared_values(sample.there.unique().to_pylist(), separator)
        return f"{pieces:,} values in lists{missing}"
    return f"{sample.estimate_distinct():,} values{missing}"

"""Generates rows of the Criteo form, as fast as the disk takes them: real cardinalities, Zipf ids, missing values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Distinct ids of C1 ... C26, and the shares of missing values, in the Criteo Kaggle log.
CARDINALITIES = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
MISSING_COUNTS = (0.45, 0.0, 0.21, 0.22, 0.03, 0.22, 0.04, 0.0, 0.04, 0.45, 0.04, 0.77, 0.22)
MISSING_IDS = 0.11
ZIPF_EXPONENT = 1.1
CLICK_RATE = 0.256
ROWS_AT_A_TIME = 100_000
HEXADECIMAL = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)


def write_rows(path: Path, rows: int) -> None:
    """Write `rows` rows of a pure function of their numbers: a longer file begins with a shorter one."""
    with path.open("wb") as file:
        for first in range(0, rows, ROWS_AT_A_TIME):
            lines = _draw_lines(np.random.default_rng(first), ROWS_AT_A_TIME)[: rows - first]
            whole = pc.binary_join(pa.ListArray.from_arrays([0, len(lines)], lines), "\n")[0]
            file.write(whole.as_buffer())
            file.write(b"\n")


def _draw_lines(rng: np.random.Generator, rows: int) -> pa.Array:
    cells = [pa.array((rng.random(rows) < CLICK_RATE).astype(np.int8)).cast(pa.string())]
    for place, missing in enumerate(MISSING_COUNTS):
        counts = np.floor(np.exp(rng.normal(1 + place % 4, 1.5, rows))).astype(np.int64)
        cells.append(pa.array(counts, mask=rng.random(rows) < missing).cast(pa.string()).fill_null(""))
    for place, cardinality in enumerate(CARDINALITIES):
        ids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(8), rows, [None, _draw_ids(rng, rows, place, cardinality)])
        absent = rng.random(rows) < (MISSING_IDS if cardinality > 100 else 0.0)
        cells.append(pc.if_else(pa.array(absent), "", ids.cast(pa.binary()).cast(pa.string())))
    return pc.binary_join_element_wise(*cells, "\t")


def _draw_ids(rng: np.random.Generator, rows: int, place: int, cardinality: int) -> pa.Buffer:
    """Return ids as 8 hexadecimal digits each, of ranks that follow a power law (by inversion)."""
    power = 1 - ZIPF_EXPONENT
    ranks = ((cardinality**power - 1) * rng.random(rows) + 1) ** (1 / power)
    mixed = np.minimum(ranks, cardinality).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(place * 7919)
    codes = (mixed >> np.uint64(32)).astype(">u4").view(np.uint8).reshape(rows, 4)
    digits = np.empty((rows, 8), dtype=np.uint8)
    digits[:, 0::2], digits[:, 1::2] = HEXADECIMAL[codes >> 4], HEXADECIMAL[codes & 15]
    return pa.py_buffer(digits.tobytes())

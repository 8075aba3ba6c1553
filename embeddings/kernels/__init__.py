"""Loops over rows, compiled by Numba: they know arrays, and nothing of tables, processes or torch."""

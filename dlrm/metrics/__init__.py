"""Exact metrics of any number of scores."""

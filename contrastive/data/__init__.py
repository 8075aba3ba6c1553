"""Sequences of actions: from files to a prepared folder, its splits, and the batches that are read from it."""

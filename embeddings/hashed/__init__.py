"""Rows on demand: tables whose rows come into being when they are pushed, of an id space that may have no end."""

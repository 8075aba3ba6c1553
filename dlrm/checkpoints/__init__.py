"""Checkpoints: written by many ranks as one, whole or not at all, and read by any others."""

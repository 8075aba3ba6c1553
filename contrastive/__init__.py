"""Recommenders of sequences, trained by contrast: MCLRec, its encoders, and what it takes to judge them."""

"""Ranks: started, joined and compared, watched, and made to speak with one voice."""

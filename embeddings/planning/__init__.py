"""Where tables should lie, and what that costs; without torch."""

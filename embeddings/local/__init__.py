"""Rows in the memory of this process, on the CPU: whole tables, or rectangles of them."""

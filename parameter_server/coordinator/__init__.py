"""The coordinator: who takes part, who holds which rows and data, and how far everybody is."""

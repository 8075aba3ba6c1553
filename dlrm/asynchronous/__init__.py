"""Trainers beside parameter servers: each at its own pace, on leased data, with tables elsewhere and a shared MLP."""

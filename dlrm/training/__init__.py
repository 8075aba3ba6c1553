"""The training loop and what it leans on: steps, evaluation, guards, logs."""

"""The training loop and what it leans on: metrics, checkpoints, guards."""

"""Click models: batches, models, optimizers, the training loop, checkpoints, reports and the command line."""

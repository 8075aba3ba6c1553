"""Dense optimizers and learning-rate schedules."""

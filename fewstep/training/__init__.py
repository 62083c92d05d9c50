"""Training: the loop, its optimizers, schedules, number formats and checkpoints, the data and the objectives."""

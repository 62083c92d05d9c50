"""Training: trainer, optimizers, precision, data, checkpoints, objectives."""

"""Checkpoints: their format, their folder, saving them while the run continues, weights to start from."""

"""Checkpoints: their format, their folder, writing them while a run goes on, weights to start from."""

"""The engine: training, evaluation, prediction, checkpoints."""

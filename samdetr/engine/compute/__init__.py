"""How a step computes: precision, compiled regions, CUDA graphs, activation checkpointing, the micro-batch."""

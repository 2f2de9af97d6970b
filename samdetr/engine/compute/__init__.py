"""How a step computes: device, precision, compiled regions, CUDA graphs, activation checkpointing."""

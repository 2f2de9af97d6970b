"""How a step computes: device, precision, compiled parts, CUDA graphs, activation checkpointing."""

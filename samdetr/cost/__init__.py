"""Cost of a model: flops, memory and parameters, beside published numbers."""

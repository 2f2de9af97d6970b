"""Cost of a model: operations, memory and parameters, beside published numbers."""

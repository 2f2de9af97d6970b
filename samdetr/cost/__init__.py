"""What a model costs: operations, memory and parameters, beside what is published."""

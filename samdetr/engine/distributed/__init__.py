"""Several processes: what they tell each other, a model among them, starting them."""

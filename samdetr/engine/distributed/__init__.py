"""Several processes: launching them, what they tell each other, what they decide, and a model among them."""

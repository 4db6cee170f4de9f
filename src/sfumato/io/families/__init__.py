"""Published checkpoints, a file for each family: the names of its weights, and its shape as the weights tell it."""

"""A training run: set-up, the loop, the train step, the optimizer, evaluation in between, guards."""

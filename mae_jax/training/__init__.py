"""Training runs: set-up, the training loop, the train step, optimizers, periodic evaluation, guards."""

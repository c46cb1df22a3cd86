"""What a training process holds: the optimizers and their lines to a service."""

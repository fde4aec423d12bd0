"""What the training scripts share: arguments, loaders, the loop, checkpoints and metrics; one concept per file."""

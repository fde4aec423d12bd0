"""What the training scripts share: arguments, loaders, the loop, checkpoints and logs; one concept per file."""

"""What every script stands on: errors, files, logs, processes, signals and random numbers; one concept per file."""

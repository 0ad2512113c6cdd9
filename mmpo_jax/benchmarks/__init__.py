"""What a model is asked to measure it, and how its answers are scored: a file per benchmark."""

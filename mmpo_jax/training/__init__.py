"""Train state, jitted step, loop, reference cache and checkpoints."""

"""Log-probs of responses that are there."""

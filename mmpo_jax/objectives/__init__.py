"""Losses: pure functions of log-probs and per-response fields; they know no model and no mesh."""

"""Feedback on responses: divide them into claims, check each claim, combine the verdicts."""

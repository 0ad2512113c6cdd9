"""Feedback on responses: judges give them scores, and pairs are made of these."""

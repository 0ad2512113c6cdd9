"""Hallucination metrics."""

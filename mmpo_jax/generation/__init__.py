"""Sampling responses with one prompt cache read by many samples."""

"""Recipes: an experiment as typed data, checked when it is loaded."""

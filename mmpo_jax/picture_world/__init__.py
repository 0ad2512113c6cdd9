"""A synthetic world of coloured shapes with known truth, for the quick start and the tests."""

"""The loop that runs a model over records, for whatever is wanted of them."""

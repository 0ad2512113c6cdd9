"""What a recipe will take of TPUs that are not there: memory, exchange, time."""

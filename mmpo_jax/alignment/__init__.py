"""The rounds of alignment: which stage runs next and what is already done."""

"""What is wrong with rejected responses, as questions and answers to learn from (nSFT)."""

"""What a person looks at of runs: one page with curves, tables and prompts."""

"""What is compiled, kept and found again."""

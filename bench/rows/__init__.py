"""One cell in one round as data: its key, its columns, the file that keeps it."""

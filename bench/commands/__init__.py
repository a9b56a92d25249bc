"""One verb a file: its arguments, one call, one show."""

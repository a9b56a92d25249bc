"""A test double: only that it can be found matters."""

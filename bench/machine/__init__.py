"""The machine that a run was made on: what it is, what it draws, what it can do at most."""

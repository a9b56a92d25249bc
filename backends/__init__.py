"""Bundle -> artifact -> session -> images. `backends/registry.py` has a line for each backend."""

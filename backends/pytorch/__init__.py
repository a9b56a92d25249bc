"""What the backend `torch` rewrites in diffusers' modules."""

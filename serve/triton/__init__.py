"""A bundle behind NVIDIA's Triton: the repository that it reads, and what it runs."""

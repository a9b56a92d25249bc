"""Which of two is slower, by how much, and how sure that is."""

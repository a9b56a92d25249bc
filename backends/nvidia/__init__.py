"""What backends on an NVIDIA GPU share."""

"""Where weights come from: the hub, a folder, random numbers."""

"""A pipeline or a server under load, by MLPerf's load generator and by people who type."""

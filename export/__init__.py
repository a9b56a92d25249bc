"""Checkpoint -> bundle. Imports no backend."""

"""Prompts to images over sessions."""

"""Pipeline -> results -> verdicts."""

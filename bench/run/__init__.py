"""From what was asked to rows: plan, worker processes, the order of rounds."""

"""What git says of the checkout."""

from __future__ import annotations

import subprocess

from core.files import ROOT


def git(*arguments: str) -> str | None:
    """Output of a git command in the checkout; None outside of git, or where it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def revision() -> str:
    """The checkout's revision, with `-dirty` when it has changes; `unknown` outside of git."""
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or "unknown"

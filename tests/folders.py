"""Laying out and changing files as the hub and diffusers do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def lay_out(cache: Path, repo: str, files: Path, commit: str) -> None:
    """Put `files` into a hub cache as one snapshot, as huggingface_hub lays it out."""
    root = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(files, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

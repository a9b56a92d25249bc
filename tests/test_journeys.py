"""The journeys of docs/journeys.md, each from its first command to its last, in one clone."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from clones import run_in
from test_readme import SHORT

from core.files import ROOT

PAGE = (ROOT / "docs" / "journeys.md").read_text()
JOURNEYS = {
    title: re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
STAND_INS = {
    r"(?<=--model )sd15(?= )": "tiny-sd",
    r"(?<=addbench sweep )(?!.*--dry-run)": f"{SHORT} ",
    # No export for either side, and workers that need no compile.
    r"^addbench ab --base HEAD$": "addbench ab --base HEAD --model build/tiny-sdxl-random-fp16"
    f" --backend null --steps 1 --decoder taesd --rounds 5 {SHORT}",
}
"""Pattern -> what takes its place; all else runs as the page says it."""
ELSEWHERE = {
    "addbench train --smoke": "run by the CI script",
}


def test_there_are_ten() -> None:
    assert len(JOURNEYS) == 10
    assert all(command in PAGE.splitlines() for command in ELSEWHERE)
    assert all(blocks for blocks in JOURNEYS.values())


@pytest.mark.slow
@pytest.mark.parametrize("title", JOURNEYS)
def test_journey(title: str, clone: Path) -> None:
    for kind, block in JOURNEYS[title]:
        if kind == "python":
            commands = [["python", "-c", block]]
        else:
            commands = [
                shlex.split(stand_in(line)) for line in block.splitlines() if line not in ELSEWHERE
            ]
        for words in commands:
            done = run_in(clone, words)
            fine = (0, 5) if words[1:2] == ["ab"] else (0,)  # one code twice: undecided at worst
            assert done.returncode in fine, f"{words}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def stand_in(command: str) -> str:
    for pattern, text in STAND_INS.items():
        command = re.sub(pattern, text, command)
    return command

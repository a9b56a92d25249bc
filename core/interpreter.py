"""Whether a Python may run the project, and whether it has this checkout installed.

    python -I core/interpreter.py [VERSION] [--installed]

The Makefile asks, also Pythons that are too old: nothing here is newer than 3.6 or imports ours.
"""

import importlib.util
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


def main(asked: str, installed: bool) -> str:
    """Return what is wrong, or an empty text.

    Args:
        asked: the version that is wanted, as `3.11`; empty for any that the project takes.
        installed: look too whether `addbench` is this checkout's. A folder that moved, or another
            checkout's install into the same environment, leaves it somewhere else.
    """
    with open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as stream:
        taken = re.search('requires-python = ">=([0-9.]+),<([0-9.]+)"', stream.read())
    assert taken, "pyproject.toml says which versions the project takes"
    low, high = taken.groups()
    floor, limit = ([int(part) for part in end.split(".")] for end in (low, high))
    if not floor <= list(sys.version_info[:2]) < limit:
        return (
            f"error: addbench cannot run on Python {VERSION}\n"
            f"  why:  it needs >={low}, <{high}, and this is {sys.executable}\n"
            f"  next: make install PYTHON=python{low}"
        )
    if asked not in ("", VERSION):
        return f"Python {VERSION}, not {asked}"
    if installed:
        spec = importlib.util.find_spec("addbench")
        place = os.path.realpath(spec.origin or "") if spec else "nowhere"
        if place != os.path.realpath(os.path.join(ROOT, "addbench", "__init__.py")):
            return f"addbench is installed from {place}"
    return ""


if __name__ == "__main__":
    versions = [word for word in sys.argv[1:] if word != "--installed"]
    wrong = main("".join(versions), "--installed" in sys.argv)
    if wrong:
        sys.stderr.write(wrong + "\n")
        sys.exit(2)

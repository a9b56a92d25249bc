"""`addbench VERB`: the one command. A verb is imported when it is asked for."""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Sequence

from addbench.verbs import GROUPS, TOOLKIT, VERBS, Verb
from core.cli import run
from core.errors import EXIT_OK, PreconditionError
from core.files import ROOT
from core.git import git, revision

SUMMARY = "Export, compile and measure few-step text-to-image models on real hardware."
WIDTH = 11
"""The column of names in the list of verbs."""
ENVIRONMENT = {
    "ADDBENCH_BUILD": "where bundles, the artifact cache and training lie (build/ of the checkout)",
    "ADDBENCH_CACHE_GB": "the cap of the artifact cache; the least recently used go beyond it (30)",
    "ADDBENCH_OPTIMUM": "the environment of backend optimum (.venv-optimum of the checkout)",
    "ADDBENCH_PYTHON": "set by the program for its own workers; not to be set by hand",
    "ADDBENCH_TOKEN": "the token of `addbench serve`, which a list of processes does not show",
    "ADDBENCH_TEST_BUNDLES": "where tests keep the bundles that they share",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if verb == "help" and rest and rest != ["--all"]:
        verb, rest = rest[0], [*rest[1:], "--help"]  # `addbench help VERB`
    if rest and f"{verb} {rest[0]}" in VERBS:
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    if verb in ("help", "-h", "--help"):
        print(help_text(everything=rest == ["--all"]))
    elif verb == "--version":
        print(version_text())
    else:
        code: int = find_verb(verb).load().main(rest)
        return code
    return EXIT_OK


def find_verb(name: str) -> Verb:
    """The verb of that name.

    Raises:
        PreconditionError: there is none; it names the nearest.
    """
    if name in VERBS:
        return VERBS[name]
    near = difflib.get_close_matches(name, VERBS, 1)
    raise PreconditionError(
        f"addbench has no verb {name!r}",
        f"did you mean {near[0]}?" if near else f"its verbs: {', '.join(VERBS)}",
        f"addbench {near[0]} --help" if near else "addbench help",
    )


def version_text() -> str:
    """The version, with the revision where the checkout is one of git."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    git_text = f" (revision {revision()})" if git("rev-parse", "HEAD") else ""
    return f"addbench {project['version']}{git_text}"


def help_text(everything: bool = False) -> str:
    """Verbs by group, a line each; with `everything` also those of the toolkit, and variables."""
    lines = ["usage: addbench VERB ...   (addbench VERB --help says more)", "", SUMMARY]
    groups = {**GROUPS, "the toolkit itself": TOOLKIT} if everything else GROUPS
    for title, verbs in groups.items():
        lines += ["", title]
        for verb in verbs:
            lines.append(f"  {verb.name:<{WIDTH}} {verb.help}")
            if missing := verb.missing:
                why = f"{', '.join(missing)} not installed (make install)"
                lines.append(f"  {'':<{WIDTH}} not usable here: {why}")
    if everything:
        lines += ["", "environment"]
        lines += [f"  {name:<22} {what}" for name, what in ENVIRONMENT.items()]
    else:
        lines += ["", "addbench help --all: the verbs about the toolkit itself, and what it reads"]
    return "\n".join(lines)


def command() -> None:
    """The console script."""
    if "_ARGCOMPLETE" in os.environ:
        from addbench.completion import complete

        complete()
    raise SystemExit(run(main))


if __name__ == "__main__":
    command()

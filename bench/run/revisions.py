"""Two revisions side by side: a worktree, an environment, a bundle and a cache for each."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine.environment import PACKAGES
from bench.run.spawn import with_build
from core.errors import AddbenchError, PreconditionError
from core.files import ROOT, build_root, sha256_json

WORKTREE = "WORKTREE"
"""The revision that is the working tree, with what is not committed."""
Say = Callable[[str], None]
VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Revision:
    """One revision, ready to run.

    Attributes:
        name: `base` or `head`.
        revision, commit: as asked for, and its hash; of WORKTREE that of a snapshot.
        tree: its checkout; commands run there import its code.
        build: its ADDBENCH_BUILD, so that neither sees the other's artifacts.
        interpreter: of the environment that its constraints ask for.
    """

    name: str
    revision: str
    commit: str
    tree: Path
    build: Path
    interpreter: Path

    def __str__(self) -> str:
        if self.revision == WORKTREE:
            return f"{WORKTREE} (uncommitted, on {self.recorded[:9]})"
        return f"{self.revision} ({self.commit[:9]})"

    @property
    def recorded(self) -> str:
        """The commit that its rows name: of WORKTREE the one that it was changed from."""
        return resolve("HEAD") if self.revision == WORKTREE else self.commit

    def python(self, *arguments: str, log: Path) -> int:
        """Run the side's python in its checkout; everything it prints goes to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            return subprocess.run(
                [str(self.interpreter), *arguments],
                cwd=self.tree,
                env=with_build(self.build),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            ).returncode

    def versions(self) -> dict[str, str]:
        """Return the versions in the side's environment of the packages that headers name."""
        asked = [str(self.interpreter), "-c", VERSIONS, *PACKAGES]
        done = subprocess.run(asked, cwd=self.tree, capture_output=True, text=True, check=True)
        found: dict[str, str] = json.loads(done.stdout)
        return found


def git(*arguments: str, **variables: str) -> str:
    """Output of a git command on this checkout; AddbenchError with git's words if it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    if done.returncode:
        raise AddbenchError(
            f"git {' '.join(arguments[:2])} failed",
            done.stderr.strip() or f"exit code {done.returncode}",
            "mend that and run it again",
        )
    return done.stdout


def require_own_repository() -> None:
    """Refuse to start inside another repository, whose revisions a person there would expect.

    Raises:
        PreconditionError: the current folder belongs to another checkout.
    """
    asked = ["git", "rev-parse", "--show-toplevel"]
    done = subprocess.run(asked, capture_output=True, text=True)
    here = Path(done.stdout.strip())
    if done.returncode == 0 and here.resolve() != ROOT.resolve():
        raise PreconditionError(
            f"the current folder is in another checkout: {here}",
            f"revisions of addbench are compared, and this addbench runs from {ROOT}",
            f"cd {ROOT} and run it again; or run the addbench of the other checkout there:"
            " python -m addbench ab",
        )


def new_code() -> list[str]:
    """Files that git does not know yet in the folders of this checkout's code. Others, a picture
    or a log beside them, change nothing that is measured."""
    kept = {path.split("/")[0] for path in git("ls-files", "--", "*.py").split()}
    new = git("ls-files", "--others", "--exclude-standard", "-z").split("\0")
    return [path for path in new if path.split("/")[0] in kept]


def changed() -> bool:
    """Whether this checkout holds code that no revision has: changes, or new files of it."""
    try:
        return bool(git("status", "--porcelain", "--untracked-files=no") or new_code())
    except AddbenchError:  # no repository: the revisions will not be found, which says so
        return False


def snapshot() -> str:
    """A commit of the working tree as it is, on no branch; neither index nor files are touched.

    The same content on the same commit gives the same one, so that a kept checkout is used again.
    """
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        git("read-tree", "HEAD", **index)
        git("add", "--update", **index)
        if new := new_code():
            git("add", "--", *new, **index)
        tree = git("write-tree", **index).strip()
    who = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "addbench"), ("EMAIL", ""), ("DATE", "2000-01-01T00:00:00Z"))
    }
    return git("commit-tree", tree, "-p", "HEAD", "-m", "the working tree", **who).strip()


def resolve(revision: str) -> str:
    """The commit of a revision, or a snapshot of the working tree for WORKTREE."""
    if revision == WORKTREE:
        return snapshot()
    try:
        spec = f"{revision}^{{commit}}"
        commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", spec)
    except AddbenchError as error:
        raise PreconditionError(
            f"{revision!r} is not a revision of this repository",
            error.why if "not a git" in error.why else "git finds no such commit",
            "pass a branch, tag or commit; in CI, check out with the whole history",
        ) from error
    return commit.strip()


def file_at(commit: str, path: str) -> str | None:
    """A file as it is in a commit; None if it is not there."""
    if not git("ls-tree", commit, "--", path):
        return None
    return git("show", f"{commit}:{path}")


def protocol_of(commit: str) -> object:
    """The worker protocol that a commit speaks; None if it has no worker or does not say."""
    try:
        body = ast.parse(file_at(commit, "bench/worker.py") or "").body
    except SyntaxError:
        return None
    for node in body:
        if isinstance(node, ast.Assign) and [
            target.id for target in node.targets if isinstance(target, ast.Name)
        ] == ["PROTOCOL"]:
            return node.value.value if isinstance(node.value, ast.Constant) else None
    return None


@contextlib.contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """Where the checkouts lie: `folder`, kept, or a scratch folder that is removed."""
    from filelock import FileLock, Timeout

    git("worktree", "prune")  # what a killed run left behind
    place = build_root() / "ab" if folder is None else folder.absolute()
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PreconditionError(
            f"another `addbench ab` is at work in {place}",
            "two at once would disturb each other's measurements",
            "wait for it",
        ) from None
    try:
        if folder is not None:
            yield place
            return
        for old in place.glob("run-*"):
            remove(old)
        scratch = Path(tempfile.mkdtemp(dir=place, prefix="run-"))
        try:
            yield scratch
        finally:
            remove(scratch)
    finally:
        lock.release()


def remove(folder: Path) -> None:
    """Delete a scratch folder and have git forget the worktrees in it."""
    shutil.rmtree(folder, ignore_errors=True)
    git("worktree", "prune")


def check_out(place: Path, name: str, commit: str) -> Path:
    """A worktree of `commit` below `place`: a clean one that is there already, or a new one."""
    tree = place / f"{name}-{commit[:12]}" / "tree"
    if (tree / ".git").exists():
        clean = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=all"],
            cwd=tree, capture_output=True, text=True,
        )  # fmt: skip
        if clean.returncode == 0 and not clean.stdout:
            return tree
    shutil.rmtree(tree, ignore_errors=True)
    git("worktree", "prune")
    git("worktree", "add", "--detach", "--force", str(tree), commit)
    return tree


def requirements(commit: str, extra: str) -> tuple[str, list[str]]:
    """(constraints, requirements) of a commit: what decides its environment.

    Raises:
        PreconditionError: it has no such extra.
    """
    project = tomllib.loads(file_at(commit, "pyproject.toml") or "").get("project", {})
    optional = project.get("optional-dependencies", {})
    if extra not in optional:
        raise PreconditionError(
            f"there is no extra {extra!r} in the pyproject.toml of {commit[:9]}",
            f"it has {', '.join(optional) or 'none'}",
            "name one of them with --extra",
        )
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in
             (file_at(commit, "constraints.txt") or "").splitlines())  # fmt: skip
    constraints = "".join(f"{line}\n" for line in sorted(filter(None, lines)))
    return constraints, sorted([*project.get("dependencies", []), *optional[extra]])


def differences(commits: Sequence[str], extra: str) -> list[str]:
    """What the environments of two commits are asked to hold differently, a line each."""
    was, now = (
        {*constraints.splitlines(), *packages}
        for constraints, packages in (requirements(commit, extra) for commit in commits)
    )
    return [
        *(f"-{line}" for line in sorted(was - now)),
        *(f"+{line}" for line in sorted(now - was)),
    ]


def environments(commits: Sequence[str], extra: str, place: Path, say: Say) -> list[Path]:
    """The interpreter for each commit: this one where all ask for the same, else one for each."""
    wanted = [requirements(commit, extra) for commit in commits]
    if all(one == wanted[0] for one in wanted):
        return [Path(sys.executable)] * len(commits)
    return [environment(*one, place, say) for one in wanted]


def environment(constraints: str, packages: Sequence[str], place: Path, say: Say) -> Path:
    """A virtual environment with `packages` under `constraints`, made unless it is there."""
    folder = place / f"env-{sha256_json([constraints, packages, sys.version])[:12]}"
    interpreter, done = folder / "bin" / "python", folder / ".complete"
    if done.exists():
        return interpreter
    say(f"installing {len(packages)} packages into {folder.name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "constraints.txt").write_text(constraints)
    install = ["-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", *packages]
    commands = [[sys.executable, "-m", "venv", "."]]
    commands += [[str(interpreter), *install]] if packages else []
    for command in commands:
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if made.returncode:
            raise AddbenchError(
                "the environment of a revision could not be made",
                (made.stderr or made.stdout).strip()[-2000:],
                "the two revisions have different constraints; both must be installable here",
            )
    done.touch()
    return interpreter


def check_code(side: Revision, log: Path) -> None:
    """Refuse to measure one revision's name with another's code."""
    code = (
        "import pathlib, core.files;"
        " raise SystemExit(core.files.ROOT.resolve() != pathlib.Path.cwd().resolve())"
    )
    if side.python("-c", code, log=log):
        raise AddbenchError(
            f"{side.name} does not run its own code",
            f"python in {side.tree.parent.name} imports another checkout, or cannot import it",
            "unset PYTHONPATH and PYTHONSAFEPATH",
        )


def export(side: Revision, arguments: Sequence[str], log: Path) -> Path:
    """The side's own bundle, made by its own code with these arguments of `addbench export`."""
    target = side.build / f"bundle-{sha256_json(list(arguments))[:8]}"
    if side.python("-m", "export", *arguments, "--out", str(target), log=log):
        tail = log.read_text(errors="replace").strip()[-1500:]
        raise AddbenchError(
            f"{side.name} {side} could not export the model",
            tail,
            "check that revision out and run the export there",
        )
    return target


def sides(
    revisions: Sequence[str], commits: Sequence[str], place: Path, extra: str, say: Say
) -> list[Revision]:
    """`base` and `head`, checked out and with an environment each that fits."""
    interpreters = environments(commits, extra, place, say)
    made = []
    for name, revision, commit, interpreter in zip(
        ("base", "head"), revisions, commits, interpreters, strict=True
    ):
        tree = check_out(place, name, commit)
        build = tree.parent / "build"
        build.mkdir(exist_ok=True)
        made.append(Revision(name, revision, commit, tree, build, interpreter))
    return made

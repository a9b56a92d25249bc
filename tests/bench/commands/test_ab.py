"""`addbench ab`: order, budget and confirmation on scripted sides; then real revisions in a scratch
repository, with a scripted worker, and (slow) with the real one on the null backend.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import warm
from made import cell, row

from bench.rows.cell import Cell
from bench.rows.store import Row, open_run, run_names
from bench.run import revisions as sides
from bench.run.duel import absolute
from bench.run.orders import BASE, HEAD, Trial, order
from bench.run.progress import Display
from bench.verdict.outcome import Line
from core.errors import AddbenchError, PreconditionError
from core.files import ROOT
from export.bundle import Bundle

GROUP = [cell(steps=steps) for steps in (1, 2, 4)]
OTHER = [cell(steps=steps, decoder="vae") for steps in (1, 2)]


class Scripted:
    """Two sides as `Trial` measures them, with a clock of their own (a test double)."""

    def __init__(
        self,
        head: Callable[[Cell, int], float] = lambda _cell, _round: 1.0,
        status: Callable[[int, Cell, int], str] = lambda _side, _cell, _round: "ok",
        seconds: float = 1.0,
        start: float = 0.0,
    ) -> None:
        self.head, self.status, self.seconds, self.start = head, status, seconds, start
        self.now = 0.0
        self.calls: list[tuple[int, int, list[Cell]]] = []

    def measure(self, side: int, group: Sequence[Cell], round_: int) -> Iterator[tuple[Cell, Row]]:
        self.calls.append((round_, side, list(group)))
        self.now += self.start
        for each in group:
            self.now += self.seconds
            factor = self.head(each, round_) if side == HEAD else 1.0
            wobble = 1 + 0.01 * (-1) ** (round_ // 2)
            status = self.status(side, each, round_)
            samples = [10.0 * factor * wobble] if status == "ok" else []
            columns = {"median_ms": None} if status != "ok" else {}
            yield each, row(each, samples, round_, status=status, **columns)

    def lines(self, cells: Sequence[Cell], rounds: int = 10, budget_s: float = 1e6) -> list[Line]:
        """Measure whatever a trial asks for, as a runner does; its verdicts."""
        trial = Trial(cells, rounds, 0.08, budget_s, lambda: self.now, lambda _: None)
        for turn in trial.turns():
            for each, measured in self.measure(turn.side, turn.cells, turn.round):
                trial.note(turn, each, measured)
        return trial.lines

    def rounds_of(self, wanted: Cell, side: int = HEAD) -> int:
        return sum(wanted in group for _, which, group in self.calls if which == side)


def verdicts(lines: Sequence[Line]) -> list[str]:
    return [line.verdict for line in lines]


def test_the_order_is_abba_group_by_group() -> None:
    assert [order(round_) for round_ in range(4)] == [(0, 1), (1, 0), (0, 1), (1, 0)]
    scripted = Scripted()
    scripted.lines([*GROUP, *OTHER], rounds=5)
    assert [(round_, side, group[0].decoder) for round_, side, group in scripted.calls[:8]] == [
        (0, BASE, "taesd"),
        (0, HEAD, "taesd"),
        (0, BASE, "vae"),
        (0, HEAD, "vae"),
        (1, HEAD, "taesd"),
        (1, BASE, "taesd"),
        (1, HEAD, "vae"),
        (1, BASE, "vae"),
    ]
    assert len(scripted.calls) == 5 * 2 * 2


def test_a_regression_is_measured_once_more() -> None:
    scripted = Scripted(head=lambda each, _: 1.2 if each == GROUP[1] else 1.0)
    lines = scripted.lines([*GROUP, *OTHER])
    assert [line.verdict for line in lines] == ["same", "slower", "same", "same", "same"]
    assert "confirmed" in lines[1].reason
    assert scripted.rounds_of(GROUP[1]) == 20
    assert scripted.rounds_of(GROUP[0]) == 10


def test_progress_counts_what_is_measured_once_more(capsys: pytest.CaptureFixture[str]) -> None:
    slow = Scripted(lambda each, _round: 1.3 if each == GROUP[1] else 1.0)
    display = Display(30, 5)
    trial = Trial(GROUP, 5, 0.08, 1e6, lambda: slow.now, lambda _: None, display.more)
    for turn in trial.turns():
        display.loading(turn.cells, turn.round)
        for each, measured in slow.measure(turn.side, turn.cells, turn.round):
            trial.note(turn, each, measured)
            display.finished(measured)
    assert verdicts(trial.lines) == ["same", "slower", "same"]
    assert (display.done, display.total) == (40, 40)
    shown = capsys.readouterr().out
    assert "[30/40] loading" in shown
    assert "(round 5 of 5, once more)" in shown


def test_what_is_not_flagged_again_is_no_regression() -> None:
    scripted = Scripted(head=lambda _, round_: 1.2 if round_ < 10 else 1.0)
    lines = scripted.lines(GROUP)
    assert {line.verdict for line in lines} == {"same"}
    assert "not confirmed" in lines[0].reason
    assert "+20.0% at first" in lines[0].reason
    contrary = Scripted(head=lambda _, round_: 1.2 if round_ < 10 else 0.8)
    assert set(verdicts(contrary.lines(GROUP))) == {"inconclusive"}


def test_a_gain_needs_no_confirmation() -> None:
    scripted = Scripted(head=lambda *_: 0.8)
    assert set(verdicts(scripted.lines(GROUP))) == {"faster"}
    assert scripted.rounds_of(GROUP[0]) == 10


def test_failures_by_side() -> None:
    def status(side: int, each: Cell, round_: int) -> str:
        if each == GROUP[0]:
            return "mismatch" if side == HEAD and round_ == 3 else "ok"
        if each == GROUP[1]:
            return "oom" if side == BASE else "ok"
        return "crashed" if side == BASE and round_ < 6 else "ok"

    lines = Scripted(status=status).lines(GROUP)
    assert [line.verdict for line in lines] == ["failed", "failed", "inconclusive"]
    assert "HEAD: mismatch in 1 rounds" in lines[0].reason
    assert "BASE: oom in 10 rounds" in lines[1].reason
    assert "4 rounds have both sides" in lines[2].reason


def test_the_budget_cuts_cells_and_never_rounds() -> None:
    # A round of a cell costs 2 s; ten rounds and room to confirm one: 80 s hold three cells.
    scripted = Scripted()
    lines = scripted.lines([*GROUP, *OTHER], budget_s=80)
    assert [line.verdict for line in lines] == ["same"] * 3 + ["inconclusive"] * 2
    assert "--budget" in lines[3].reason
    assert [scripted.rounds_of(each) for each in GROUP] == [10, 10, 10]
    assert scripted.rounds_of(OTHER[0]) == 1
    assert scripted.now <= 80


def test_a_cell_bears_the_start_of_its_process() -> None:
    # Starting costs 20 s a round and cells 2 s: 44 s for the first, whichever is first.
    scripted = Scripted(start=10.0)
    lines = scripted.lines(GROUP, budget_s=500)
    assert [line.verdict for line in lines] == ["same", "same", "same"]
    assert set(verdicts(Scripted(start=10.0).lines(GROUP, budget_s=300))) == {"inconclusive"}


def test_the_first_round_ends_when_it_fills_the_budget() -> None:
    many = [cell(decoder=decoder, batch=batch) for decoder in ("vae", "taesd") for batch in (1, 2)]
    scripted = Scripted(seconds=100.0)
    lines = scripted.lines(many, budget_s=1800)
    assert {line.verdict for line in lines} == {"inconclusive"}
    assert len(scripted.calls) == 2


def test_the_worst_suspect_is_confirmed_whatever_is_left() -> None:
    scripted = Scripted(head=lambda each, _: 1.1 + 0.1 * each.steps)
    lines = scripted.lines(GROUP, budget_s=85)
    assert [line.verdict for line in lines] == ["inconclusive", "inconclusive", "slower"]
    assert "no time to confirm" in lines[0].reason


# ---- revisions


def git(repo: Path, *arguments: str) -> str:
    identity = ["-c", "user.email=a@example.org", "-c", "user.name=a"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=repo, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


BARE = "[project]\nname = 'x'\ndependencies = []\n[project.optional-dependencies]\ncpu = []\n"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of this project with the scripted worker in three revisions, tagged.

    `base`; `slow`, whose null backend takes longer by default; `new`, whose worker speaks a
    protocol that nobody knows yet; `broken`, whose second cell gives a wrong image; `bare` and
    `pinned`, whose environments hold nothing and whose constraints differ.
    """
    repo = tmp_path_factory.mktemp("scratch") / "repo"
    repo.mkdir()
    for name in ("addbench", "core", "export", "backends", "bench"):
        shutil.copytree(ROOT / name, repo / name, ignore=shutil.ignore_patterns("__pycache__"))
    (repo / "tests").mkdir()
    for name in ("pyproject.toml", "constraints.txt", ".gitignore", "tests/warm.py"):
        shutil.copy(ROOT / name, repo / name)
    worker = repo / "bench" / "worker.py"
    shutil.copy(Path(__file__).with_name("scripted_worker.py"), worker)
    project = repo / "pyproject.toml"
    null = repo / "backends" / "null.py"
    text = null.read_text().replace('"unet_ms": Option(2.0', '"unet_ms": Option(20.0')
    null.write_text(text)
    git(repo, "init", "--quiet")
    for tag, file, was, now in (
        ("base", null, "", ""),
        ("slow", null, '"unet_ms": Option(20.0', '"unet_ms": Option(60.0'),
        ("new", worker, "PROTOCOL = 1", "PROTOCOL = 2"),
        ("broken", null, '"""A scripted', '"""SCRIPTED_FAILURE'),
        ("noted", repo / "constraints.txt", "torch==", "# tried and kept\ntorch=="),
        ("bare", project, project.read_text(), BARE),
        ("pinned", repo / "constraints.txt", "tqdm==", "tqdm>="),
    ):
        if tag != "base":
            git(repo, "checkout", "--quiet", "bare" if tag == "pinned" else "base")
            content = file.read_text()
            assert was in content
            file.write_text(content.replace(was, now))
        git(repo, "add", "--all")
        git(repo, "commit", "--quiet", "--message", tag)
        git(repo, "tag", tag)
    git(repo, "checkout", "--quiet", "base")
    warm.SEATS.add((sys.executable, repo.resolve()))
    return repo


class Finished:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def ab(scratch: Path, tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Any]:
    """Run `addbench ab` in the scratch repository; nothing of it may be left there afterwards."""

    def run(*arguments: str, backend: str = "null") -> Finished:
        command = [sys.executable, "-m", "addbench", "ab", "--model", str(tiny_bundle.path)]
        command += ["--backend", backend, "--decoder", "taesd", "--steps", "1,2"]
        command += ["--rounds", "5", "--out", str(tmp_path / "runs"), "--format", "json"]
        return Finished(
            subprocess.run([*command, *arguments], cwd=scratch, capture_output=True, text=True)
        )

    yield run
    assert git(scratch, "worktree", "list").count("\n") == 0
    assert not list((scratch / "build" / "ab").glob("run-*"))


def test_a_slower_revision_is_a_regression(ab: Any, tmp_path: Path) -> None:
    found = ab("--base", "base", "--head", "slow")
    assert found.code == 3, found.err
    outcome = found.json
    assert [line["verdict"] for line in outcome["cells"]] == ["slower", "slower"]
    assert outcome["cells"][0]["ratio"] == pytest.approx(3, rel=0.2)
    runs = [open_run(name, tmp_path / "runs") for name in run_names(tmp_path / "runs")]
    assert [(run.header.ab or {})["side"] for run in runs] == ["base", "head"]
    assert [len(run.all_rows()) for run in runs] == [20, 20]  # five rounds, and five again
    medians = [run.rows()[0]["median_ms"] for run in runs]
    assert medians[0] == pytest.approx(20, rel=0.25)
    assert medians[1] == pytest.approx(60, rel=0.25)
    assert runs[0].rows()[0]["git_commit"] != runs[1].rows()[0]["git_commit"]


def test_the_other_way_round_it_is_a_gain(ab: Any) -> None:
    found = ab("--base", "slow", "--head", "base")
    assert found.code == 0, found.err
    assert found.json["counts"] == {"faster": 2}


def test_what_is_not_committed_is_the_head(ab: Any, scratch: Path, tmp_path: Path) -> None:
    """An edit against HEAD used to compare HEAD with itself, without a word."""
    null = scratch / "backends" / "null.py"
    committed = null.read_text()
    (scratch / "core" / "new.py").write_text("")  # git may take it: it is measured too
    null.write_text(committed.replace('"unet_ms": Option(20.0', '"unet_ms": Option(60.0'))
    try:
        before = git(scratch, "status", "--porcelain")
        found = ab("--base", "HEAD", "--steps", "1")
        kept = ab("--base", "HEAD", "--head", "HEAD", "--steps", "1")
        assert git(scratch, "status", "--porcelain") == before
    finally:
        null.write_text(committed)
        (scratch / "core" / "new.py").unlink()
    assert found.code == 3, found.err
    assert found.json["head"].startswith("WORKTREE (uncommitted, on ")
    head = open_run("latest", tmp_path / "runs")
    runs = [open_run(name, tmp_path / "runs") for name in run_names(tmp_path / "runs")]
    changed = runs[1].rows()[0]
    assert (changed["git_dirty"], runs[0].rows()[0]["git_dirty"]) == (True, False)
    assert changed["git_commit"] == git(scratch, "rev-parse", "HEAD")
    assert head.rows()[0]["git_dirty"] is False
    assert kept.code in (0, 5), kept.err
    assert any("--head WORKTREE" in note for note in kept.json["notes"])


def test_another_repository_is_refused(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    asked = [sys.executable, "-m", "addbench", "ab", "--base", "HEAD"]
    done = subprocess.run(
        asked, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"another checkout: {tmp_path.resolve()}" in done.stderr
    assert f"cd {ROOT}" in done.stderr


def test_a_failing_cell(ab: Any) -> None:
    found = ab("--base", "base", "--head", "broken")
    assert found.code == 4, found.err
    assert found.json["cells"][1]["verdict"] == "failed"


def test_an_unknown_protocol_is_inconclusive(ab: Any) -> None:
    found = ab("--base", "new", "--head", "base")
    assert found.code == 5, found.err
    assert found.json["cells"] == []
    assert "protocol 2" in found.json["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "nowhere"], "not a revision"),
        (["--base", "base", "--rounds", "4"], "too few"),
        (["--base", "base", "--decoder", "jpeg"], "jpeg"),
        (["--head", "base"], "--base"),
    ],
)
def test_preconditions(ab: Any, arguments: list[str], words: str) -> None:
    found = ab(*arguments)
    assert found.code == 2, found.err
    assert words in found.err


def test_what_no_clock_times_is_refused(ab: Any) -> None:
    found = ab("--base", "base", backend="qaic:device=ai100-ultra")
    assert found.code == 2, found.err
    assert "has no speed to compare" in found.err


def test_a_folder_is_meant_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "random", "tiny-sdxl"):
        (tmp_path / name).mkdir()
    assert absolute("mine") == absolute("./mine") == str(tmp_path / "mine")
    assert [absolute(name) for name in ("random", "tiny-sdxl", "org/name")] == [
        "random",
        "tiny-sdxl",
        "org/name",
    ]


def test_an_unusable_backend(ab: Any) -> None:
    found = ab("--base", "base", backend="null:usable=0")
    assert found.code == 2
    assert "cannot be used" in found.err


def test_ctrl_c_leaves_nothing_behind(
    scratch: Path, tiny_bundle: Bundle, tmp_path: Path, ab: Any
) -> None:
    log = tmp_path / "err.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "addbench", "ab", "--base", "base", "--head", "slow",
             "--model", str(tiny_bundle.path), "--backend", "null", "--out", str(tmp_path)],
            cwd=scratch, stdout=subprocess.DEVNULL, stderr=stream,
        )  # fmt: skip
    until = time.monotonic() + 90
    while "round 1" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130, log.read_text()


def test_a_kept_workplace_is_used_again(ab: Any, scratch: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    for _ in range(2):
        found = ab("--base", "base", "--head", "base", "--work", str(work))
        assert found.code in (0, 5), found.err
        assert any("one commit" in note for note in found.json["notes"])
    trees = sorted(path.name for path in work.glob("*/tree"))
    assert trees == ["tree", "tree"]
    shutil.rmtree(work)
    git(scratch, "worktree", "prune")


def test_what_lies_about_is_no_change_and_new_code_is(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "ROOT", scratch)
    (scratch / "picture.png").write_bytes(b"of a run")
    try:
        assert not sides.changed()
        head = sides.git("rev-parse", "HEAD^{tree}").strip()
        assert sides.git("rev-parse", f"{sides.snapshot()}^{{tree}}").strip() == head
        (scratch / "core" / "new.py").write_text("")
        assert sides.changed()
        files = sides.git("ls-tree", "-r", "--name-only", sides.snapshot()).split()
        assert "core/new.py" in files
        assert "picture.png" not in files
    finally:
        (scratch / "core" / "new.py").unlink(missing_ok=True)
        (scratch / "picture.png").unlink()


# ---- environments


def test_one_environment_if_the_constraints_are_equal(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sides, "ROOT", scratch)
    commits = [sides.resolve(tag) for tag in ("base", "slow")]
    found = sides.environments(commits, "cpu", tmp_path, lambda _: None)
    assert found == [Path(sys.executable)] * 2
    assert sides.protocol_of(commits[0]) == 1
    assert sides.protocol_of(sides.resolve("new")) == 2
    with pytest.raises(PreconditionError, match="not a revision"):
        sides.resolve("--help")


def test_a_comment_is_no_constraint(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sides, "ROOT", scratch)
    commits = [sides.resolve(tag) for tag in ("base", "noted")]
    found = sides.environments(commits, "cpu", tmp_path, lambda _: None)
    assert found == [Path(sys.executable)] * 2
    with pytest.raises(PreconditionError, match="no extra 'gpus'"):
        sides.environments(commits, "gpus", tmp_path, lambda _: None)


def test_other_constraints_get_an_environment_each(ab: Any, scratch: Path, tmp_path: Path) -> None:
    """End to end, with environments that hold nothing: the scripted worker needs no package."""
    found = ab("--base", "bare", "--head", "pinned", "--work", str(tmp_path / "work"))
    assert found.code in (0, 5), found.err
    assert {line["verdict"] for line in found.json["cells"]} <= {"same", "inconclusive"}
    assert [line["head_rounds"] for line in found.json["cells"]] == [5, 5]
    (note,) = [note for note in found.json["notes"] if "constraints differ" in note]
    assert "-tqdm==" in note
    assert "+tqdm>=" in note
    assert len(list((tmp_path / "work").glob("env-*/.complete"))) == 2
    runs = [open_run(name, tmp_path / "runs") for name in run_names(tmp_path / "runs")]
    # What the sides' environments hold, and not what this one does.
    assert [run.header.environment["versions"] for run in runs] == [{}, {}]
    shutil.rmtree(tmp_path / "work")
    git(scratch, "worktree", "prune")


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    said: list[str] = []
    first = sides.environment("", [], tmp_path, said.append)
    assert subprocess.run([first, "-c", "import pip"]).returncode == 0
    assert sides.environment("", [], tmp_path, said.append) == first
    assert len(said) == 1
    with pytest.raises(AddbenchError, match="could not be made"):
        sides.environment("", ["./no-such-folder"], tmp_path, said.append)


def test_code_of_another_checkout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    side = sides.Revision("base", "x", "0" * 40, tmp_path / "empty", tmp_path, Path(sys.executable))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        with pytest.raises(AddbenchError, match="its own code"):
            sides.check_code(side, tmp_path / "log.txt")
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@pytest.mark.slow
def test_with_the_real_worker(scratch: Path, ab: Any) -> None:
    """Each round starts a worker that imports torch: minutes."""
    git(scratch, "checkout", "--quiet", "-B", "real", "base")
    worker = scratch / "bench" / "worker.py"
    shutil.copy(ROOT / "bench" / "worker.py", worker)
    git(scratch, "commit", "--quiet", "--all", "--message", "real")
    null = scratch / "backends" / "null.py"
    null.write_text(null.read_text().replace("Option(20.0", "Option(200.0"))
    git(scratch, "commit", "--quiet", "--all", "--message", "slower")
    found = ab("--base", "real~1", "--head", "real", "--steps", "1", "--min-time", "0.1")
    assert found.code == 3, found.err
    assert found.json["cells"][0]["ratio"] > 2
    git(scratch, "checkout", "--quiet", "base")

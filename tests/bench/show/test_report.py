"""The page of a run: what it says, what it never lets through, and that a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made import cell, make_run, row

from bench.commands.show import main as show
from bench.rows.fields import FLAGS
from bench.rows.store import HEADER, ROWS, Row, Run
from bench.rows.summary import by_cell
from bench.show.page import figures
from bench.show.page.page import code, render
from core.cli import run as shell
from export.bundle import PARITY, Bundle

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)> & "quoted"'
ERROR = {"type": "BadThing", "what": f"broken by {HOSTILE}", "why": "a cause", "next": "a remedy"}
VOID = {"meta", "link", "line", "polyline", "img", "br"}


def stages(step_ms: float) -> dict[str, float | None]:
    return {"text": 4.0, "unet_first": 12.0, "unet_step": step_ms, "decode": 7.0, "rest": 1.0}


@pytest.fixture
def made(tmp_path: Path) -> Run:
    """Two rounds over six cells, one of which fails, and one with a hostile option."""
    rows = [
        row(
            cell(steps=steps, decoder=decoder, backend="ort"),
            [batch_ms + 10.0 * steps + jitter for jitter in (0.0, 0.5, 0.2)],
            round_=round_,
            process_cold=steps == 1,
            flags=["disturbed"] if steps == 2 else [],
            stages_ms=stages(10.0),
            stages_from="same_call",
        )
        for round_ in range(2)
        for decoder, batch_ms in (("vae", 50.0), ("taesd", 5.0))
        for steps in (1, 2, 4)
    ]
    rows.append(row(cell(options="x=<b>$1", backend="ort"), [9.0, 9.1], stages_ms=stages(1.0)))
    rows += [row(cell(backend="torch"), [], status="failed", error=ERROR, round_=n) for n in (0, 1)]
    return make_run(tmp_path / "runs", rows, rounds=2)


class Outline(HTMLParser):
    """Checks that elements are closed in order and ids are unique; keeps what refers elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.refers: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                self.refers.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_complete_in_itself(made: Run) -> None:
    text = render(made)
    outline = Outline(text)
    assert len(outline.ids) == len(set(outline.ids)), "two SVGs share an id"
    inside = {f"#{name}" for name in outline.ids}
    for target in outline.refers:
        assert target in inside or target == "data:,", target
    assert outline.tags.count("script") == 1
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert text == render(made), "the same run gives the same bytes"


def test_nothing_from_a_row_becomes_markup(made: Run) -> None:
    text = render(made)
    assert "broken by &lt;/script&gt;&lt;script&gt;" in text
    assert "<script>document" not in text
    assert "<img" not in text
    assert "<b>$1" not in text
    assert "x=&lt;b&gt;$1" in text


def test_figures_carry_their_labels(made: Run) -> None:
    text = render(made)
    card = text[text.index("Shortest call") :][:900]
    for word in ("9.05", "measured", "storage fp16", "precision fp32", "random weights"):
        assert word in card
    cheapest = text[text.index("Cheapest step") :][:900]
    assert "10 ms/step + 5" in cheapest
    assert "13 of 16 measurements are ok, 2 failed, 1 missing" in text
    assert "<b>disturbed</b>" in text
    assert "<b>unstable</b>" not in text


def test_failed_and_missing_cells_are_listed(made: Run) -> None:
    text = render(made)
    assert "torch taesd batch 1 steps 1: failed" in text
    assert "round 1, 2" in text  # alike, so said once
    assert text.count("a remedy") == 1
    for word in ("BadThing", "a cause"):
        assert word in text
    assert "ort:x=&lt;b&gt;$1 taesd batch 1 steps 1, round 2</li>" in text


def test_every_flag_has_its_words(tmp_path: Path) -> None:
    page = render(make_run(tmp_path, [row(cell(), [10.0] * 3, flags=list(FLAGS))]))
    text = re.sub(r"</?code>", "`", html.unescape(page))
    assert all(meaning in text for meaning in FLAGS.values())


def test_a_cell_with_no_calm_round_is_dimmed(tmp_path: Path) -> None:
    def rounds(steps: int, *flags: list[str]) -> list[Row]:
        return [
            row(cell(steps=steps), [10.0] * 3, round_=n, flags=each) for n, each in enumerate(flags)
        ]

    half = rounds(1, ["disturbed"], [])
    assert 'class="dim"' not in render(make_run(tmp_path, half, rounds=2))
    rows = [*half, *rounds(2, ["disturbed"], ["disturbed"])]
    text = render(make_run(tmp_path, rows, rounds=2))
    assert text.count('<tr class="dim">') == 2  # in the main columns and in all of them


def test_provenances_are_kept_apart(tmp_path: Path) -> None:
    rows = [
        row(cell(), [10.0] * 3, stages_ms=stages(1.0)),
        row(cell(), [90.0] * 3, round_=1, provenance="modelled", stages_ms=stages(1.0)),
    ]
    text = render(make_run(tmp_path, rows, rounds=2))
    assert "Provenance: measured" in text
    assert "Provenance: modelled" in text
    assert "measured, modelled" not in text
    assert text.count("Shortest call") == 2
    assert 'data-key="50.0"' not in text  # the median of both is nobody's


def test_a_run_in_which_nothing_worked_still_has_a_page(tmp_path: Path) -> None:
    text = render(make_run(tmp_path, [row(cell(), [], status="crashed", error=ERROR)]))
    Outline(text)
    assert "there is nothing to draw" in text
    assert "a remedy" in text
    assert "no roofline" in text
    assert "No published figure is of a model and a device of this run" in text


def test_the_verdict_against_a_base(tmp_path: Path) -> None:
    def rounds(scale: float) -> Run:
        rows = [
            row(cell(), [scale * (10 + 0.01 * n)] * 3, round_=n, stages_ms=stages(1.0))
            for n in range(6)
        ]
        return make_run(tmp_path, rows, rounds=6)

    base, head = rounds(1.0), rounds(2.0)
    text = render(head, base)
    assert f"Verdict against {base.name}" in text
    assert "regression: 1 slower of 1 cells" in text
    assert "+100." in text
    assert "Verdict" not in render(head)
    out = tmp_path / "page.html"
    argv = [str(head.path), "--base", str(head.path), "--out", str(out)]
    assert shell(show, ["--as", "page", *argv]) == 2  # a run is no base of itself
    assert not out.exists()


def test_the_verdict_says_which_cell_and_why_before_the_rest(tmp_path: Path) -> None:
    cells = [
        cell(options=options, low_memory=low) for options in ("", "x=1") for low in (False, True)
    ]
    base, head = (make_run(tmp_path, [row(each, [9.0] * 3) for each in cells]) for _ in range(2))
    text = render(head, base)
    table = text[text.index("Verdict by cell") : text.index('id="table"')]
    heads = [name for name in re.findall(r"<th[^>]*>([^<]*)", table) if name]
    first = ["backend", "options", "decoder", "batch", "steps", "base (ms)", "head (ms)", "verdict"]
    assert heads[:9] == [*first, "reason"]
    assert ">yes<" in table
    assert "True" not in table


def test_the_main_columns_all_say_something(made: Run) -> None:
    text = render(made)
    table = text[text.index('id="table"') : text.index("<details>")]
    heads = re.findall(r"<th[^>]*>([^<]*)", table)
    assert "median (ms)" in heads
    assert not {"guidance", "low memory"} & set(heads)


def test_commands_in_sentences_are_code(made: Run) -> None:
    text = render(made)
    assert "<code>addbench claims</code>" in text
    assert code("`<b>` & `x`") == "<code>&lt;b&gt;</code> &amp; <code>x</code>"


def test_parity_is_of_the_bundle_that_was_measured(
    made: Run, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    text = render(made)
    assert "there is no bundle of tiny-sdxl" in text
    assert "looked for build/tiny-sdxl" in text  # the page is passed on: no folder of this machine
    assert str(tmp_path) not in text
    home = tmp_path / "build" / "tiny-sdxl-random-fp16"
    home.mkdir(parents=True)
    for file in tiny_bundle.path.iterdir():
        if file.name != PARITY:
            (home / file.name).symlink_to(file)
    assert "the bundle here is not the one that was measured" in render(made)
    bundle = {**made.header.bundle, "hash": tiny_bundle.hash}
    made = replace(made, header=replace(made.header, bundle=bundle))
    assert "parity has not been run on this bundle" in render(made)
    record = json.loads((tiny_bundle.path / PARITY).read_text())
    (home / PARITY).write_text(json.dumps(record))
    text = render(made)
    assert "Every part and every image is within it" in text
    assert "vae_decoder" in text
    record["parts"]["unet"]["ok"] = False
    (home / PARITY).write_text(json.dumps(record))
    assert "ort does not match torch FP32" in render(made)
    (home / PARITY).write_text('{"schema": 1}')
    assert "parity.json is of another schema" in render(made)


def test_stages_add_up_to_the_call() -> None:
    one = row(cell(steps=4), [54.0] * 3, stages_ms=stages(10.0))
    (line,) = by_cell([one])
    assert sum(figures.stage_ms(line, name) for name, _, _ in figures.STAGES) == 54.0


def points_of(text: str) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in text.split())
    return [(float(x), float(y)) for x, y in pairs]


def test_a_trace_keeps_every_sample_inside_its_box() -> None:
    rows = [row(cell(), [10.0, 20.0, 9.0, 10.0]), row(cell(), [10.0, 10.0], round_=1)]
    trace = figures.trace(by_cell(rows)[0])
    first, second = map(points_of, trace.lines)
    assert [x for x, _ in (*first, *second)] == pytest.approx([0, 16.67, 33.33, 50, 83.33, 100])
    assert all(0 <= y <= 40 for _, y in (*first, *second))
    assert first[1][1] < first[0][1] < first[2][1]  # slower is higher
    assert (trace.low, trace.high) == pytest.approx((-0.1, 1.0))
    assert (trace.samples, trace.rounds, trace.median) == (6, 2, "10 ms")
    still = figures.trace(by_cell([row(cell(), [10.0])])[0])
    assert still.lines == ["0.00,20.0 0.00,20.0"]


# ---- the command


def test_the_command_writes_beside_the_rows(made: Run, tmp_path: Path) -> None:
    assert shell(show, ["--as", "page", "latest", "--runs", str(made.path.parent)]) == 0
    assert (made.path / "report.html").read_text().startswith("<!doctype html>")
    assert (
        shell(show, ["--as", "page", str(made.path), "--out", str(tmp_path / "new" / "page.html")])
        == 0
    )
    assert (tmp_path / "new" / "page.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        (ROWS, "", 2),
        (ROWS, '{"schema": 1, "torn', 2),
        (ROWS, '{"schema": 2}\n', 4),
        (ROWS, "no json\n{}\n", 4),
        (ROWS, "[]\n", 4),
        (HEADER, '{"schema": 7}', 2),
        (HEADER, '{"schema": 1, "run": "x"}', 2),
        (HEADER, '{"torn', 4),
    ],
)
def test_a_bad_run_writes_nothing(
    made: Run, file: str, content: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    page = made.path / "report.html"
    page.write_text("as before")
    (made.path / file).write_text(content)
    assert shell(show, ["--as", "page", str(made.path)]) == code
    assert page.read_text() == "as before"
    said = capsys.readouterr().err
    assert "error: " in said
    assert "next: " in said


def test_a_torn_last_row_is_a_missing_one(made: Run) -> None:
    content = (made.path / ROWS).read_bytes()
    (made.path / ROWS).write_bytes(content[:-30])
    assert "13 of 16 measurements are ok, 1 failed, 2 missing" in render(made)


@pytest.mark.parametrize("name", [HEADER, ROWS, "."])
def test_what_was_measured_is_not_overwritten(made: Run, name: str) -> None:
    before = (made.path / HEADER).read_bytes(), (made.path / ROWS).read_bytes()
    assert shell(show, ["--as", "page", str(made.path), "--out", str(made.path / name)]) == 2
    assert before == ((made.path / HEADER).read_bytes(), (made.path / ROWS).read_bytes())


def test_two_results_of_one_cell_are_refused(made: Run) -> None:
    content = (made.path / ROWS).read_text()
    (made.path / ROWS).write_text(content + content.splitlines(keepends=True)[0])
    assert shell(show, ["--as", "page", str(made.path)]) == 4
    assert not (made.path / "report.html").exists()


def test_a_base_of_another_model_is_refused(made: Run, tmp_path: Path) -> None:
    base = make_run(tmp_path / "other", [row(cell(), [1.0] * 3)])
    header = json.loads((base.path / HEADER).read_text())
    header["bundle"]["name"] = "another"
    (base.path / HEADER).write_text(json.dumps(header))
    assert shell(show, ["--as", "page", str(made.path), "--base", str(base.path)]) == 2
    assert not (made.path / "report.html").exists()


# ---- in a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
BROWSER_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom")  # fmt: skip
needs_browser = pytest.mark.skipif(not BROWSER, reason="neither chromium nor chrome is installed")
PROBE = """<script>
window.addEventListener("error", (event) => { document.body.dataset.error = event.message; });
const table = document.querySelector("table.sortable");
const heads = [...table.tHead.rows[0].cells];
const at = heads.findIndex((head) => head.textContent.startsWith("median (ms)"));
const column = () => [...table.tBodies[0].rows].map((row) => row.cells[at].textContent).join();
heads[at].querySelector("button").click();
document.body.dataset.rising = column();
heads[at].querySelector("button").click();
document.body.dataset.falling = column();
document.body.dataset.aria = heads[at].getAttribute("aria-sort");
document.body.dataset.requests = performance.getEntriesByType("resource").length;
document.body.dataset.overflow = document.documentElement.scrollWidth - window.innerWidth;
</script></body>"""


def browse(page: Path, profile: Path, width: int = 1280) -> tuple[str, str]:
    """(the document after scripts ran, what the browser's console said)."""
    options = [f"--user-data-dir={profile}", f"--window-size={width},900"]
    command = [BROWSER, *BROWSER_FLAGS, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def probed(text: str) -> str:
    """The page with a script of the test's; its own policy would refuse one."""
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    return PROBE.join(free.rsplit("</body>", 1))


@needs_browser
def test_a_browser_runs_the_page_without_complaint(made: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render(made))
    document, console = browse(page, tmp_path / "profile")
    assert console == ""
    assert document.count('data-sorting="ready"') == render(made).count('class="sortable"')
    assert "<title>tiny-sdxl: run " in document


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_headers_sort_and_nothing_is_fetched(made: Run, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    page.write_text(probed(render(made)))
    document, console = browse(page, tmp_path / "profile", width)
    assert console == ""
    assert "data-error" not in document
    said = dict(re.findall(r'data-(rising|falling|aria|requests|overflow)="([^"]*)"', document))
    rising = said["rising"].split(",")
    figures = [float(text) for text in rising[:-1]]
    assert figures == sorted(figures)
    assert rising[-1] == said["falling"].split(",")[-1] == "-"  # what has no figure stays last
    assert [float(text) for text in said["falling"].split(",")[:-1]] == figures[::-1]
    assert said["aria"] == "descending"
    assert said["requests"] == "0"
    assert int(said["overflow"]) <= 0, "the page scrolls sideways"


@needs_browser
def test_the_policy_refuses_a_script_that_is_not_ours(made: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = render(made)
    foreign = '<script>document.title="owned"</script></body>'
    page.write_text(foreign.join(text.rsplit("</body>", 1)))
    document, _ = browse(page, tmp_path / "profile")
    assert "<title>owned" not in document
    assert made.name in document

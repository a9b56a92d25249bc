"""What is derived from rows: table, plot, published results. Same rows, same bytes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from made import cell, make_run, row
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from backends.registry import BACKENDS
from bench.commands.publish import main as publish_main
from bench.rows.names import INDEX, names_in
from bench.rows.store import HEADER, PUBLISHED, ROWS, Row, Run, open_run, run_names
from bench.rows.summary import by_cell
from bench.run.progress import Display
from bench.show import canvas, columns, publish, table
from bench.show import latency as plot
from bench.show.blocks import Drawn, Published, disagreements, fill, since_then
from bench.show.series import series_of
from bench.show.sums import SUMS
from core import files
from core.cli import run as shell
from core.errors import PreconditionError
from core.files import ROOT


def good_rows(rounds: int = 1) -> list[Row]:
    """Exactly 10 ms a step and 5 ms fixed (50 with the VAE), a little slower each round."""
    return [
        row(
            cell(steps=steps, decoder=decoder, batch=batch, options=options),
            [batch * (fixed + 10.0 * steps) * (1 + 0.01 * round_) + jitter for jitter in (0, 0, 1)],
            round_=round_,
        )
        for round_ in range(rounds)
        for options in ("", "unet_ms=3")
        for batch in (1, 4)
        for decoder, fixed in (("vae", 50.0), ("taesd", 5.0))
        for steps in (1, 2, 4)
    ]


@pytest.fixture
def made(tmp_path: Path) -> Run:
    return make_run(tmp_path / "runs", good_rows())


def test_the_table_has_a_line_per_cell_with_units(made: Run) -> None:
    text, by_stage = table.markdown(made, made.rows()).split("## By stage")
    assert "UNet step" in by_stage
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 24
    assert len({line.count("|") for line in lines}) == 1
    head = [name.strip() for name in lines[0].strip("|").split("|")]
    for name in ("weights", "numerics", "flags", "median (ms)", "images/s", "decode (ms)"):
        assert name in head
    assert "storage fp16, precision fp32" in lines[2]
    assert "random" in lines[2]
    assert "model tiny-sdxl" in text
    assert "Failed" not in text


def test_rounds_are_aggregated_by_the_median_of_their_medians(tmp_path: Path) -> None:
    rows = [
        row(cell(), [value] * 3, round_=n, flags=flags)
        for n, (value, flags) in enumerate(
            [(10.0, []), (11.0, ["unstable"]), (30.0, ["unstable", "disturbed"])]
        )
    ]
    (line,) = by_cell(rows)
    assert line.median("median_ms") == 11.0
    assert line.flags == "unstable (2 of 3), disturbed (1 of 3)"
    rows.append(row(cell(), [], round_=3, status="crashed", error={"what": "SIGSEGV"}))
    (line,) = by_cell(rows)
    assert line.status == "crashed (1 of 4), ok (3 of 4)"
    assert line.median("median_ms") == 11.0
    text = table.markdown(make_run(tmp_path, rows, rounds=5), rows)
    assert "- null taesd batch 1 steps 1, round 4: crashed: SIGSEGV" in text
    assert "Missing:\n\n- null taesd batch 1 steps 1, round 5" in text


def test_failed_cells_have_no_figures_in_the_table(tmp_path: Path) -> None:
    rows = [row(cell(), [1.0] * 3, status="mismatch", error={"what": "PSNR 3 dB"})]
    run = make_run(tmp_path, rows)
    (line,) = by_cell(rows)
    assert line.median("median_ms") is None
    assert "mismatch: PSNR 3 dB" in table.markdown(run, rows)
    assert plot.write(run, rows) == []


def test_csv_has_every_column(made: Run) -> None:
    lines = list(csv.DictReader(table.csv(made.rows()).splitlines()))
    assert len(lines) == 24
    known = [column.header for column in columns.COLUMNS]
    assert list(lines[0]) == [name for name in known if name not in columns.SINCE]
    assert float(lines[0]["median (ms)"]) == 60.0


@pytest.mark.parametrize("width", [60, 80, 100, 140, 190])
def test_the_terminal_table_never_cuts_a_figure(
    made: Run, width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    table.show(made, made.rows(), width)
    text = capsys.readouterr().out
    assert "storage fp16" in text
    assert max(map(len, text.splitlines())) <= width
    assert "\u2026" not in text  # rich's mark of a cut
    for line in by_cell(made.rows()):
        assert f" {line.median('median_ms'):.1f} " in text


def test_the_waiting_parent_redraws_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    drawn = []
    display = Display(total=3, rounds=1)
    assert display.redraws
    monkeypatch.setattr(display.progress, "refresh", lambda: drawn.append(1))
    started = time.monotonic()
    while time.monotonic() < started + 1.3:
        display.tick()
        display.sampled(5)
    assert 1 <= len(drawn) <= 2


def test_without_a_terminal_progress_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(total=2, rounds=1) as display:
        assert not display.redraws
        display.loading([cell()], 0)
        display.begin(cell())
        display.tick()
        display.finished(row(cell(), [10.0, 10.0, 10.0], flags=["disturbed"]))
        words = {"what": "out of memory"}
        display.finished(row(cell(steps=2), [], status="oom", error=words))
    assert capsys.readouterr().out == (
        "[0/2] loading null taesd batch 1\n"
        "[1/2] null taesd batch 1 steps 1: 10.0 ms, 100 images/s (3 samples, CV 0.0%, disturbed)\n"
        "[2/2] null taesd batch 1 steps 2: oom: out of memory\n"
    )


def test_the_plot_states_the_fit_beside_the_points(made: Run) -> None:
    found = series_of({"": by_cell(made.rows())})
    assert sorted(found) == [1, 4]
    first = found[1][0]
    assert first.points("median_ms") == [(1, 60.0), (2, 70.0), (4, 90.0)]
    assert plot.fit_text(first) == "10 ms/step + 50 ms fixed, at most 0.0% off"
    assert plot.fit_text(found[4][1]) == "40 ms/step + 20 ms fixed, at most 0.0% off"
    drawn = plot.figure([(made, made.rows())])
    assert drawn is not None
    assert len(drawn.axes) == 4
    texts = [text.get_text() for legend in drawn.legends for text in legend.get_texts()]
    assert "null, vae: 10 ms/step + 50 ms fixed, at most 0.0% off" in texts
    assert len(texts) == 8


def test_series_can_be_told_apart(made: Run) -> None:
    for batch in series_of({"": by_cell(made.rows())}).values():
        looks = {(series.drawn, series.marker) for series in batch}
        assert len(looks) == len(batch)


def test_many_series_of_one_step_count_are_named_line_by_line(made: Run) -> None:
    """More backends than there are colours: fastest above, each with its own figures."""
    rows = [row for row in made.rows() if row["steps"] == 1 and row["batch"] == 1]
    many = [row | {"options": f"delay={number}"} for number in range(9) for row in rows]
    (found,) = series_of({"": by_cell(many)}).values()
    assert len(found) == 9 * len({row["decoder"] for row in rows})
    assert len({str(sorted(series.look.items())) for series in found}) == len(found)
    drawn = plot.figure([(made, many)])
    assert drawn is not None
    (axes,) = drawn.axes
    named = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(named) == sorted(series.label for series in found)
    medians = {series.label: series.points("median_ms")[0][1] for series in found}
    assert [medians[name] for name in named] == sorted(medians.values(), reverse=True)
    assert [text.get_text().split(" ms")[0] for text in axes.texts] == [
        plot.digits(medians[name]) for name in named
    ]
    assert not drawn.legends


def marks(drawn: Figure, marker: str) -> list[Line2D]:
    return [line for line in drawn.axes[0].get_lines() if line.get_marker() == marker]


def test_disturbed_rows_do_not_come_out_as_clean_dots_with_a_fit(tmp_path: Path) -> None:
    rows = [
        row(cell(steps=steps), [10.0 * steps, 10.5 * steps, 12.0 * steps], flags=flags)
        for steps, flags in ((1, ["disturbed"]), (2, ["unstable"]), (4, ["disturbed"]))
    ]
    run = make_run(tmp_path, rows)
    drawn = plot.figure([(run, rows)])
    assert drawn is not None
    assert len(marks(drawn, "x")) == 2
    assert any("2 of 3 cells: other processes ran" in text.get_text() for text in drawn.texts)
    (legend,) = drawn.legends
    assert "through 2 disturbed of 3 points" in legend.get_texts()[0].get_text()
    assert "crosses: disturbed" in legend.get_title().get_text()
    fitted = [line for line in drawn.axes[0].get_lines() if list(line.get_xdata()) == [0, 4]]
    assert [line.get_linestyle() for line in fitted] == [":"]
    spans = [list(line.get_ydata()) for line in drawn.axes[0].get_lines()]
    assert [10.0, 12.0] in spans, "every call is within its bar"
    calm = [{**each, "flags": []} for each in rows]
    drawn = plot.figure([(run, calm)])
    assert drawn is not None
    assert not marks(drawn, "x")
    assert not any("other processes" in text.get_text() for text in drawn.texts)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([(1, 10.0), (2, 20.0)], "two points, not tested"),
        ([(1, 10.0), (2, 30.0), (4, 30.0)], "no line: no cost of a step beyond"),
        ([(1, 15.0), (2, 25.0), (4, 45.0)], "at most 0.0% off"),
        ([(1, 5.0), (2, 15.0), (4, 35.0)], "no line: its points ask for a fixed cost below zero"),
    ],
)
def test_a_fit_says_what_it_is_worth(points: list[tuple[int, float]], words: str) -> None:
    rows = [row(cell(steps=steps), [ms] * 3) for steps, ms in points]
    (series,) = series_of({"": by_cell(rows)})[1]
    assert words in plot.fit_text(series)


def test_a_backend_has_one_colour_in_every_plot(made: Run) -> None:
    rows = [
        row(cell(backend=backend, options=options, steps=steps), [10.0 * steps] * 3)
        for backend, options in (("torch", ""), ("ort", "x=1"), ("ort", "precision=int8"))
        for steps in (1, 2)
    ]
    (found,) = series_of({"": by_cell(rows)}).values()
    (other,) = series_of({"": by_cell(rows[4:])}).values()
    assert found[0].colour == canvas.HUES["torch"].lower()
    assert found[2].drawn == other[0].drawn == canvas.look_of("ort", "precision=int8")
    twice = series_of({"a": by_cell(rows), "b": by_cell(rows)})[1]
    assert [series.drawn for series in twice[:3]] == [series.drawn for series in twice[3:]]
    assert len({(series.drawn, series.marker) for series in twice}) == len(twice)
    assert len(set(canvas.HUES.values())) == len(canvas.HUES)
    assert set(canvas.HUES) <= set(BACKENDS), "a backend without a colour of its own is neutral"


def test_labels_of_steps_do_not_touch() -> None:
    assert plot.spread([0, 1, 2, 4]) == ["0", "1", "2", "4"]
    assert plot.spread([0, 1, 4, 50]) == ["", "1", "4", "50"]
    assert plot.spread([1, 2, 4, 25, 50]) == ["1", "", "4", "25", "50"]
    assert plot.spread([0, 20, 21, 50]) == ["0", "", "21", "50"]


def test_thousands_have_no_exponent() -> None:
    numbers = (0.447, 4.7363, 999.4, 999.6, 1726.3, -1726.3)
    assert [plot.digits(each) for each in numbers] == [
        "0.447", "4.74", "999", "1000", "1726", "-1726",
    ]  # fmt: skip
    rows = [row(cell(steps=steps), [ms] * 3) for steps, ms in ((1, 300.0), (2, 1500.0))]
    (series,) = series_of({"": by_cell(rows)})[1]
    assert plot.fit_text(series) == "no line: its points ask for a fixed cost below zero"


def test_backends_of_one_step_count_each_but_not_the_same_one_are_drawn(tmp_path: Path) -> None:
    rows = [row(cell(steps=steps, backend=backend), [10.0 * steps] * 3)
            for backend, steps in (("ort", 1), ("torch", 2))]  # fmt: skip
    drawn = plot.figure([(make_run(tmp_path, rows), rows)])
    assert drawn is not None
    assert [tick.get_text() for tick in drawn.axes[0].get_xticklabels()] == ["0", "1", "2"]


def test_a_plot_of_one_step_count_has_points_and_no_fit(tmp_path: Path) -> None:
    rows = [row(cell(), [1.0, 1.0, 1.0])]
    run = make_run(tmp_path, rows)
    drawn = plot.figure([(run, rows)])
    assert drawn is not None
    (key,) = drawn.legends
    assert key.get_title().get_text() == "bars: all samples; one step count: no fit"
    assert [line.get_linestyle() for line in key.get_lines()] == ["None"]
    (series,) = series_of({"": by_cell(rows)})[1]
    assert plot.fit_text(series) == "1 ms"
    assert [file.suffix for file in plot.write(run, rows)] == [".svg", ".png"]


def test_the_same_rows_draw_the_same_bytes(made: Run, tmp_path: Path) -> None:
    first, _ = plot.draw([(made, made.rows())], tmp_path / "a")
    second, _ = plot.draw([(made, made.rows())], tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


# ---- publish

README_TEXT = "# Title\n\n<!-- results -->\nold\n<!-- /results -->\n\nend\n"


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    readme = tmp_path / "README.md"
    readme.write_text(README_TEXT)
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return [*folders, "--pages", str(readme)]


def test_publish_then_check(made: Run, place: list[str], tmp_path: Path) -> None:
    assert shell(publish_main, ["latest", *place]) == 0
    results = tmp_path / "results"
    published = open_run(made.name, results / "published")
    assert published.all_rows() == made.all_rows()
    names = {str(file.relative_to(results)) for file in results.rglob("*") if file.is_file()}
    assert names == {
        f"published/{made.name}/header.json",
        f"published/{made.name}/rows.jsonl",
        "published.sha256",
        f"tables/{made.name}.md",
        f"tables/{made.name}.csv",
        f"plots/{made.name}.svg",
        f"plots/{made.name}.png",
    }
    readme = (tmp_path / "README.md").read_text()
    assert f"results/plots/{made.name}.svg" in readme
    assert readme.startswith("# Title\n\n<!-- results -->\n")
    assert readme.endswith("<!-- /results -->\n\nend\n")
    assert "\nold\n" not in readme
    assert shell(publish_main, ["--check", *place]) == 0
    # Publishing changes nothing the second time.
    assert shell(publish_main, ["latest", *place]) == 0
    assert (tmp_path / "README.md").read_text() == readme


def files_below(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def edit_table(results: Path, readme: Path) -> None:
    file = next(results.glob("tables/*.md"))
    file.write_text(file.read_text().replace("60.0", "59.0"))


def edit_plot(results: Path, readme: Path) -> None:
    file = next(results.glob("plots/*.svg"))
    file.write_text(file.read_text().replace("</svg>", "<g/></svg>", 1))


def drop_png(results: Path, readme: Path) -> None:
    next(results.glob("plots/*.png")).unlink()


def stray(results: Path, readme: Path) -> None:
    (results / "tables" / "stray.md").write_text("x")


def edit_readme(results: Path, readme: Path) -> None:
    readme.write_text(readme.read_text().replace("60.0", "59.0"))


def unpublish(results: Path, readme: Path) -> None:
    readme.write_text("no block")
    shutil.rmtree(next((results / "published").iterdir()))


@pytest.mark.parametrize("change", [edit_table, edit_plot, drop_png, stray, edit_readme, unpublish])
def test_check_finds_what_is_stale(
    change: object, made: Run, place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell(publish_main, ["latest", *place]) == 0
    assert callable(change)
    change(tmp_path / "results", tmp_path / "README.md")
    before = files_below(tmp_path)
    assert shell(publish_main, ["--check", *place]) == 4
    assert "stale: " in capsys.readouterr().out
    assert files_below(tmp_path) == before


def flip_row(run: Path) -> None:
    lines = (run / ROWS).read_text().splitlines()
    first = json.loads(lines[0])
    first["median_ms"] += 1
    (run / ROWS).write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")


def edit_header(run: Path) -> None:
    text = (run / HEADER).read_text()
    (run / HEADER).write_text(text.replace("A CPU", "A better CPU"))


def copy_by_hand(run: Path) -> None:
    shutil.copytree(run, run.with_name(run.name + "-again"))


def drop_header(run: Path) -> None:
    (run / HEADER).unlink()


def drop_sums(run: Path) -> None:
    (run.parents[1] / SUMS).unlink()


def double_a_sum(run: Path) -> None:
    file = run.parents[1] / SUMS
    file.write_text(file.read_text() * 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_row, f"{ROWS} was changed"),
        (edit_header, f"{HEADER} was changed"),
        (copy_by_hand, f"{HEADER} was added, and 1 more"),
        (drop_header, f"{HEADER} was removed"),
        (drop_sums, f"{HEADER} was added, and 1 more"),
        (double_a_sum, f"{SUMS}:3 is not a line of hashes"),
    ],
)
def test_an_edited_run_is_noticed_and_a_redraw_does_not_take_it(
    change: Callable[[Path], None],
    words: str,
    made: Run,
    place: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert shell(publish_main, ["latest", *place]) == 0
    change(tmp_path / "results" / "published" / made.name)
    before = files_below(tmp_path)
    for arguments in (["--check", *place], place):
        assert shell(publish_main, arguments) == 4
        said = capsys.readouterr().err
        assert words in said
        assert "\n  why:  " in said
        assert "\n  next: " in said
    assert files_below(tmp_path) == before


def test_publishing_the_run_again_puts_an_edit_right(
    made: Run, place: list[str], tmp_path: Path
) -> None:
    assert shell(publish_main, ["latest", *place]) == 0
    before = files_below(tmp_path / "results")
    flip_row(tmp_path / "results" / "published" / made.name)
    assert shell(publish_main, [made.name, *place]) == 0
    after = files_below(tmp_path / "results")
    assert {f: data for f, data in after.items() if f.suffix != ".png"} == {
        f: data for f, data in before.items() if f.suffix != ".png"
    }


def test_a_run_published_from_where_it_lies_stays_as_it_is(
    made: Run, place: list[str], tmp_path: Path
) -> None:
    """Its rows may lack columns of today, and its hashes are taken of them."""
    assert shell(publish_main, ["latest", *place]) == 0
    run = tmp_path / "results" / "published" / made.name
    lines = [json.loads(line) for line in (run / ROWS).read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in r.items() if k != "quality"}) + "\n" for r in lines)
    (run / ROWS).write_text(text)
    assert shell(publish_main, [str(run), *place]) == 0
    assert (run / ROWS).read_text() == text
    assert shell(publish_main, ["--check", *place]) == 0


def test_the_sums_are_those_of_sha256sum(made: Run, place: list[str], tmp_path: Path) -> None:
    assert shell(publish_main, ["latest", *place]) == 0
    command = ["sha256sum", "--check", "--strict", SUMS]
    subprocess.run(command, cwd=tmp_path / "results", check=True)


# ---- several runs; all or nothing


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Runs, each of which the page asks for."""
    names = [make_run(tmp_path / "runs", good_rows()).name for _ in range(3)]
    page = "".join(f"<!-- results {name} -->\n<!-- /results -->\n" for name in names)
    (tmp_path / "README.md").write_text(page)
    return names


def test_runs_that_a_page_asks_for_are_published_together(
    place: list[str], three: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text(README_TEXT)
    old = make_run(tmp_path / "runs", good_rows())
    assert shell(publish_main, [old.name, *place]) == 0
    page = "".join(f"<!-- results {name} -->\n<!-- /results -->\n" for name in three)
    (tmp_path / "README.md").write_text(page)
    derive, calls = publish.derive, []
    monkeypatch.setattr(publish, "derive", lambda *to: calls.append(1) or derive(*to))
    assert shell(publish_main, [*three, three[0], *place]) == 0
    assert len(calls) == 1
    assert run_names(tmp_path / "results" / "published") == sorted([*three, old.name])
    page = (tmp_path / "README.md").read_text()
    assert all(f"results/plots/{name}.svg" in page for name in three)
    assert shell(publish_main, ["--check", *place]) == 0


def test_a_page_that_asks_for_another_run_leaves_everything_as_it_was(
    place: list[str], three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_below(tmp_path)
    assert shell(publish_main, [*three[:2], *place]) == 2
    assert f"asks for the results of run {three[2]}" in capsys.readouterr().err
    assert files_below(tmp_path) == before
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_what_cannot_be_drawn_or_written_leaves_everything_as_it_was(
    error: type[BaseException],
    place: list[str],
    made: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert shell(publish_main, ["latest", *place]) == 0
    before = files_below(tmp_path)
    second = make_run(tmp_path / "runs", good_rows())
    before |= files_below(second.path)

    def refuse(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(table, "csv", refuse)
        assert shell(publish_main, [second.name, *place]) != 0
    assert files_below(tmp_path) == before
    write, written = files.write_atomic, []

    def write_some(path: Path, data: bytes) -> None:
        if path == tmp_path / "results" / SUMS and not written:
            written.append(path)
            raise error
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", write_some)
        assert shell(publish_main, [second.name, *place]) != 0
    assert written
    assert files_below(tmp_path) == before
    assert not (tmp_path / "results" / "published" / second.name).exists()


def test_a_page_that_is_no_text_is_refused(
    made: Run, place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff")
    assert shell(publish_main, ["latest", *place]) == 2
    assert "README.md is no page" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_make_publishes_several_runs() -> None:
    def recipe(*runs: str) -> str:
        # Run by make itself, it would print the folder around its lines.
        quiet = ["--no-print-directory", "--dry-run", "--old-file=.venv/.ready-cpu"]
        command = ["make", *quiet, "publish", *runs]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip().splitlines()[-1]

    assert recipe("RUN=a b").endswith("-m addbench publish 'a' 'b'")
    assert recipe("RUN=latest").endswith("-m addbench publish 'latest'")
    assert recipe().endswith("-m addbench publish")


def published(target: Run, **shown: str) -> Published:
    return Published(target, target.label, target.rows(), **{"brief": "", **shown})


def test_a_named_block_shows_that_run(made: Run, tmp_path: Path) -> None:
    text = f"<!-- results {made.name} -->\n<!-- /results -->\n<!-- results -->\n<!-- /results -->\n"
    newer = make_run(tmp_path / "runs", good_rows())
    drawn = Drawn([published(made, brief="this\n", stages="by stage\n"),
                   published(newer, brief="newest\n")])  # fmt: skip
    named, newest = fill(text, drawn, "../results").split("<!-- results -->")
    assert named.startswith(f"<!-- results {made.name} -->\nthis\n")
    assert f"(../results/plots/{made.name}.svg)" in named
    assert newest.startswith("\nnewest\n")
    staged = f"<!-- stages {made.name} -->\n<!-- /stages -->\n"
    assert fill(staged, drawn, "results") == staged.replace("-->\n<", "-->\nby stage\n<")
    with pytest.raises(PreconditionError, match="asks for the results"):
        fill(text, Drawn(), "results")
    unnamed = "<!-- results -->\nsoon\n<!-- /results -->\n"
    assert fill(unnamed, Drawn(), "results") == unnamed


def test_a_block_shows_the_columns_and_rows_it_asks_for(made: Run) -> None:
    drawn = Drawn([published(made)])
    asked = 'columns="backend,decoder, steps,median" rows="batch=1 decoder=vae|taesd steps=1"'
    text = f'<!-- results {made.name} {asked} sort="median" -->\nold\n<!-- /results -->\n'
    opened, header, rule, *rest = fill(text, drawn, "results").splitlines()
    assert opened == text.splitlines()[0]
    assert [word.strip() for word in header.split("|")[1:-1]] == [
        "backend", "decoder", "steps", "median (ms)"
    ]  # fmt: skip
    assert rule.endswith(": |")
    lines = [line for line in rest if line.startswith("|")]
    expected = [line for line in by_cell(made.rows()) if line.cell.steps == line.cell.batch == 1]
    assert len(lines) == len(expected) > 1
    medians = [float(line.split("|")[4]) for line in lines]
    assert medians == sorted(medians)
    assert f"[{made.name}](results/tables/{made.name}.md): model " in rest[-2]
    assert "A CPU, 2 cores" in rest[-2]
    again = "\n".join((opened, header, rule, *rest)) + "\n"
    assert fill(again, drawn, "results") == again


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ('columns="speed"', "a page asks for a column 'speed'"),
        ('rows="steps"', "it has no ="),
        ('rows="steps=99"', "no cell of the run is like that"),
        ('rows="colour=red"', "a page asks for a column 'colour'"),
        ('row="steps=1"', "a page's marker says row"),
    ],
)
def test_a_block_that_asks_for_what_is_not_there_is_refused(
    asked: str, words: str, made: Run
) -> None:
    text = f"<!-- results {made.name} {asked} -->\n<!-- /results -->\n"
    with pytest.raises(PreconditionError, match=re.escape(words)):
        fill(text, Drawn([published(made)]), "results")


def timed(tmp_path: Path, old_ms: float, new_ms: float, rounds: int = 3) -> Published:
    """A run of two backends, each round of either a little different."""
    rows = [
        row(cell(backend=backend), [median_ms * (1 + 0.001 * round_)] * 3, round_=round_)
        for backend, median_ms in (("torch", old_ms), ("ort", new_ms))
        for round_ in range(rounds)
    ]
    return published(make_run(tmp_path / "runs", rows, rounds=rounds))


RATIO = '<!-- ratio{} base="backend=torch" head="backend=ort" -->{}<!-- /ratio -->'


def test_a_ratio_is_drawn_from_the_rows_and_held_to_the_newest(tmp_path: Path) -> None:
    old = timed(tmp_path, 94.0, 10.0)
    name = f" {old.run.name}"
    text = f"It is {RATIO.format(name, '0')} times as fast."
    drawn = fill(text, Drawn([old]), "results")
    assert drawn == f"It is {RATIO.format(name, '9.4')} times as fast."
    assert disagreements(drawn, Drawn([old])) == []
    like = timed(tmp_path, 94.02, 10.0)
    assert disagreements(drawn, Drawn([old, like])) == []
    newer = timed(tmp_path, 94.0, 4.0)
    (problem,) = disagreements(drawn, Drawn([old, newer]))
    assert "a page says 9.4 times" in problem
    assert "23.5" in problem
    unnamed = fill(RATIO.format("", "0"), Drawn([old, newer]), "results")
    assert unnamed == RATIO.format("", "23.5")
    assert disagreements(unnamed, Drawn([old, newer])) == []


def test_a_pair_says_what_was_measured_since(tmp_path: Path) -> None:
    old = timed(tmp_path, 94.0, 10.0, rounds=1)
    like = published(make_run(tmp_path / "runs", [row(cell(backend="ort"), [9.5] * 3)]))
    assert since_then(Drawn([old, like]), old) == []
    newer = published(make_run(tmp_path / "runs", [row(cell(backend="ort"), [4.0] * 3)]))
    (note,) = since_then(Drawn([old, like, newer]), old)
    assert "taesd batch 1 steps 1 took 10 ms and takes 4 ms" in note
    assert newer.label in note


def test_half_of_a_ratio_measured_anew_contradicts_it_too(tmp_path: Path) -> None:
    old = timed(tmp_path, 94.0, 10.0, rounds=1)
    newer = published(make_run(tmp_path / "runs", [row(cell(backend="ort"), [6.0] * 3)]))
    text = fill(RATIO.format("", "0"), Drawn([old, newer]), "results")
    assert ">9.4<" in text
    assert "the newest rows of these cells say 15.67" in disagreements(text, Drawn([old, newer]))[0]
    near = published(make_run(tmp_path / "runs", [row(cell(backend="ort"), [9.5] * 3)]))
    assert disagreements(text, Drawn([old, near])) == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('base="backend=torch"', "names no head"),
        ('base="model=tiny-sdxl" head="backend=ort"', "2 measured cells"),
        ('base="backend=none" head="backend=ort"', "no published run has both"),
    ],
)
def test_a_ratio_of_anything_but_two_cells_is_refused(
    said: str, words: str, tmp_path: Path
) -> None:
    text = f"<!-- ratio {said} -->1<!-- /ratio -->"
    with pytest.raises(PreconditionError, match=re.escape(words)):
        fill(text, Drawn([timed(tmp_path, 94.0, 10.0)]), "results")


def test_a_run_is_called_by_its_name(made: Run, place: list[str], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results calm-peers -->\n<!-- /results -->\n")
    assert shell(publish_main, [made.name, "--name", "calm-peers", *place]) == 0
    results = tmp_path / "results"
    assert names_in(results / "published") == {"calm-peers": made.name}
    assert "![calm-peers: latency" in readme.read_text()
    assert f"rows: [results/published/{made.name}]" in readme.read_text()
    assert (results / "tables" / "calm-peers.md").read_text().startswith("# Run calm-peers\n")
    assert open_run("calm-peers", results / "published").name == made.name
    assert shell(publish_main, ["--check", *place]) == 0
    with (results / "published" / INDEX).open("a") as index:
        index.write('gone = "20200101-000000-000-0000"\n')
    assert shell(publish_main, ["--check", *place]) == 4
    assert shell(publish_main, [made.name, "--name", "Calm Peers", *place]) == 2
    assert shell(publish_main, ["--name", "nobody", *place]) == 2


def test_every_published_run_has_a_name_and_opens_by_it() -> None:
    names = names_in(PUBLISHED)
    assert sorted(names.values()) == run_names(PUBLISHED)
    for name, run in names.items():
        assert open_run(name).name == open_run(run).name == run


def test_what_cannot_be_published(tmp_path: Path, place: list[str]) -> None:
    rows = good_rows()
    incomplete = make_run(tmp_path / "runs", rows, rounds=2)
    with pytest.raises(PreconditionError, match="24 cells are missing"):
        publish.publish([incomplete], tmp_path / "results", [])
    failed = make_run(tmp_path / "runs", [row(cell(), [], status="crashed")])
    with pytest.raises(PreconditionError, match="no row that is ok"):
        publish.publish([failed], tmp_path / "results", [])
    rows[0]["error"] = {"what": "cannot open /srv/secret/file.bin"}
    private = make_run(tmp_path / "runs", rows)
    with pytest.raises(PreconditionError, match="/srv/secret"):
        publish.publish([private], tmp_path / "results", [])
    assert not (tmp_path / "results").exists()


def test_what_is_committed_is_fresh() -> None:
    """The repository's own results: the same check that the CI makes."""
    assert shell(publish_main, ["--check"]) == 0

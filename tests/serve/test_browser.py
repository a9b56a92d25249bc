"""The page in a real Chromium, wide and on a phone; workers are test doubles."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from running import MODEL, Running, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

Start = Callable[..., Running]
SHAPES = replace(MODEL, name="shapes-turbo", judge="shapes", steps=1)
TEXT = "a large red circle on a black background"
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-device-for-media-stream",
                  "--use-fake-ui-for-media-stream"],
        )  # fmt: skip
        yield browser
        browser.close()


def serious(message: Any) -> bool:
    """Whether a line of the console is an error; a connection that was cut is none."""
    cut = "WebSocket" in message.text or "ERR_INTERNET_DISCONNECTED" in message.text
    return message.type == "error" and not cut


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open a server's page; what it complains of fails the test."""
    pages, complaints = [], []

    def begin(server: Running, width: int = 1280, height: int = 900) -> Any:
        page = chromium.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if serious(message)
                else None)  # fmt: skip
        page.goto(f"http://127.0.0.1:{server.port}/")
        wait(page, "!!globalThis.page")
        return page

    yield begin
    for page in pages:
        page.close()
    assert not complaints


def wait(page: Any, expression: str) -> None:
    """Wait until something holds in the page; not by `wait_for_function`, which its policy of
    running no texts refuses."""
    until(lambda: page.evaluate(expression))


def wait_drawn(page: Any) -> None:
    """Wait until the picture is that of the last key."""
    wait(page, "page.last === page.key && !document.querySelector('#dot.busy')")


def pixels_of(page: Any) -> list[int]:
    values: list[int] = page.evaluate(
        "[...document.querySelector('#picture').getContext('2d').getImageData(0, 0, 8, 8).data]"
    )
    return values


def expected_pixels(prompt: str, seed: int = 0, **rest: Any) -> list[int]:
    from serve_worker_double import expected

    image = expected(prompt, seed, **rest)
    return [int(v) for row in image for pixel in row for v in (*pixel, 255)]


@pytest.mark.parametrize("width", [1280, 390])
def test_typing_draws_the_last_text(
    start: Start, open_page: Callable[..., Any], width: int
) -> None:
    server = start(model=SHAPES, draw_ms=20.0).wait_ready()
    page = open_page(server, width=width)
    assert "circles, squares, triangles and stars" in page.inner_text("#about")
    page.fill("#prompt", "")
    page.locator("#prompt").press_sequentially(TEXT, delay=5)
    wait_drawn(page)
    assert pixels_of(page) == expected_pixels(TEXT)
    assert page.inner_text("#at") == page.inner_text("#of")
    assert int(page.inner_text("#skipped")) > 0
    assert page.inner_text("#latency") != "–"
    assert "of 77 tokens" in page.inner_text("#notes")
    wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wider <= 0  # nothing sticks out on a phone


def test_knobs_and_suggestions(start: Start, open_page: Callable[..., Any]) -> None:
    page = open_page(start(model=SHAPES).wait_ready())
    page.fill("#prompt", "a large r")
    page.press("#prompt", "Tab")
    assert page.input_value("#prompt") == "a large red "
    page.click("#chips button >> text=circle")
    assert page.input_value("#prompt") == "a large red circle "
    page.click("#steps button >> text=4")
    page.click("#decoder button >> text=taesd")
    page.fill("#seed", "12x3")
    wait_drawn(page)
    want = expected_pixels("a large red circle ", 123, steps=4, decoder="taesd")
    assert pixels_of(page) == want
    page.click("#dice")
    wait_drawn(page)
    assert pixels_of(page) != want
    assert page.input_value("#seed") != "123"
    page.click("#example")
    assert page.input_value("#prompt") in page.evaluate("page.facts.examples")


def test_loading_is_shown_and_what_was_typed_meanwhile_is_drawn(
    start: Start, open_page: Callable[..., Any]
) -> None:
    page = open_page(start(load_ms=2500.0))
    page.wait_for_selector("body[data-state=loading]")
    wait(page, "document.querySelector('#veil-words').textContent.includes('loads')")
    assert page.is_visible("#progress")
    page.fill("#prompt", "early")
    page.wait_for_selector("body[data-state=ready]")
    wait_drawn(page)
    assert pixels_of(page) == expected_pixels("early")


def test_how_far_loading_is_is_shown(server: Running, open_page: Callable[..., Any]) -> None:
    page = open_page(server)
    worker = server.app.engine.attendants[0]

    def say(state: str, stage: str, share: float | None) -> None:
        worker.state, worker.stage, worker.share = state, stage, share
        server.app.live.tell_status()

    server.loop.call_soon_threadsafe(say, "loading", "loading unet, 3 of 6", 0.75)
    wait(page, "document.querySelector('#veil-words').textContent === 'loading unet, 3 of 6'")
    assert page.is_visible("#progress")
    assert page.evaluate("document.querySelector('#progress').value") == 0.75
    server.loop.call_soon_threadsafe(say, "ready", "", None)
    page.wait_for_selector("body[data-state=ready]")
    assert page.is_hidden("#progress")


def test_a_killed_worker(start: Start, open_page: Callable[..., Any]) -> None:
    server = start(draw_ms=50.0, load_ms=300.0).wait_ready()
    page = open_page(server)
    wait_drawn(page)
    life = server.app.engine.attendants[0].life
    assert life is not None
    os.kill(life.process.pid, signal.SIGKILL)
    page.locator("#prompt").press_sequentially(" and on", delay=10)
    page.wait_for_selector("body[data-state=loading]")
    page.wait_for_selector("body[data-state=ready]")
    wait_drawn(page)
    assert pixels_of(page) == expected_pixels(page.input_value("#prompt"))


def test_a_lost_connection_comes_back_by_itself(
    start: Start, open_page: Callable[..., Any]
) -> None:
    server = start().wait_ready()
    page = open_page(server)
    wait_drawn(page)
    page.context.set_offline(True)  # for what is opened anew; what is open is cut here
    for protocol in list(server.server.server_state.connections):
        server.loop.call_soon_threadsafe(protocol.transport.abort)
    page.wait_for_selector("body[data-state=lost]")
    page.fill("#prompt", "typed while it was away")
    assert "trying again" in page.inner_text("#words") or "lost" in page.inner_text("#words")
    page.context.set_offline(False)
    page.wait_for_selector("body[data-state=ready]")
    wait_drawn(page)
    assert pixels_of(page) == expected_pixels("typed while it was away")
    until(lambda: len(server.app.live.connections) == 1)


def test_errors_are_shown_and_the_next_key_draws(
    server: Running, open_page: Callable[..., Any]
) -> None:
    page = open_page(server)
    page.fill("#prompt", "refuse this")
    wait(
        page, "document.querySelector('#notes.bad')?.textContent?.startsWith('this one is refused')"
    )
    page.fill("#prompt", "x" * 5000)
    wait(page, "document.querySelector('#notes.bad')?.textContent?.startsWith('prompt has 5000')")
    page.fill("#prompt", "fine")
    wait_drawn(page)
    assert pixels_of(page) == expected_pixels("fine")


def test_nothing_is_sent_while_nobody_types(server: Running, open_page: Callable[..., Any]) -> None:
    page = open_page(server)
    wait_drawn(page)
    before = server.metric("images_total")
    page.wait_for_timeout(700)
    assert server.metric("images_total") == before


def drawing_page(start: Start, open_page: Callable[..., Any], **rest: Any) -> tuple[Any, Running]:
    model = replace(SHAPES, pictures=True, pairs=((4, 0.25), (2, 0.5), (4, 0.75)))
    server = start(model=model, **rest).wait_ready()
    page = open_page(server)
    wait(page, "page.settled")
    wait_drawn(page)
    assert page.is_hidden("#desk")
    page.click("#start")
    wait_drawn(page)
    return page, server


def test_drawing(start: Start, open_page: Callable[..., Any]) -> None:
    page, _ = drawing_page(start, open_page, draw_ms=5.0)
    before, drawn = page.inner_text("#at"), pixels_of(page)
    box = page.locator("#paper").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 200, steps=20)
    page.mouse.up()
    wait(page, "!page.desk.writing")
    wait_drawn(page)
    assert int(page.inner_text("#at")) > int(before)
    assert pixels_of(page) != drawn  # the double's picture is of the file it was given
    red = "Math.max(...page.desk.paint.getImageData(0, 0, 8, 8).data.filter((_, n) => n % 4 === 0))"
    assert page.evaluate(red) > 150
    page.click("#clear")
    wait_drawn(page)
    assert page.evaluate(red) < 50
    page.click("#start")
    wait_drawn(page)
    assert pixels_of(page) == expected_pixels(page.input_value("#prompt"))


def test_a_file_and_what_is_none(start: Start, open_page: Callable[..., Any]) -> None:
    import io

    from PIL import Image

    page, _ = drawing_page(start, open_page)
    file = io.BytesIO()
    Image.new("RGB", (300, 200), (30, 200, 40)).save(file, "PNG")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png",
                                   "buffer": file.getvalue()})  # fmt: skip
    wait(page, "page.desk.paint.getImageData(4, 4, 1, 1).data[1] > 150")
    wait_drawn(page)
    page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"no"})
    wait(page, "document.querySelector('#notes').textContent.startsWith('a.txt is no picture')")


def test_a_camera(start: Start, open_page: Callable[..., Any]) -> None:
    page, server = drawing_page(start, open_page, draw_ms=10.0)
    page.context.grant_permissions(["camera"])
    before = server.metric("images_total")
    page.click("#camera")
    wait(page, "document.querySelector('#camera').getAttribute('aria-pressed') === 'true'")
    until(lambda: server.metric("images_total") > before + 10)
    page.click("#camera")
    wait_drawn(page)
    still = server.metric("images_total")
    page.wait_for_timeout(1500)
    assert server.metric("images_total") <= still + 1

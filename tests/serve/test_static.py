"""The folder for browsers: its command, its headers, and a picture in a real browser."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backends.load import load_pipeline
from core.errors import PreconditionError
from core.files import ROOT
from export.bundle import MANIFEST, Bundle
from export.web import runtime
from serve import site
from serve.static import HEADERS, static_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader",
                "--enable-features=Vulkan")  # fmt: skip
PROMPT = "a large white star above a large green triangle on a black background"


@pytest.fixture(scope="module")
def folder(shapes_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        runtime.find_tarballs(None)
    except PreconditionError as error:
        pytest.skip(f"{error.what}: {error.why}")
    out = tmp_path_factory.mktemp("web") / "site"
    assert site.main([str(shapes_bundle.path), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "addbench", "serve", "--static", str(folder), "--port", str(port)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait(30)


def get(url: str, **headers: str) -> tuple[Any, bytes]:
    request = urllib.request.Request(url, headers=headers)
    for _ in range(50):
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.headers, answer.read()
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError(url)


def test_the_page_is_the_servers_with_another_transport(folder: Path) -> None:
    theirs = ROOT / "serve" / "page"
    for name in ("page.js", "page.css", "icon.svg"):
        assert (folder / name).read_bytes() == (theirs / name).read_bytes()
    html = (folder / "index.html").read_text()
    assert 'data-transport="transport.mjs"' in html
    assert set(re.findall(r'(?:src|href)="([^"]+)"', html)) == {
        "page.css", "page.js", "icon.svg", "opened.js",
    }  # fmt: skip
    facts = json.loads((folder / "page.json").read_text())
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [str(count) for count in facts["step_choices"]] == sorted(
        manifest["scheduler"]["counts"]
    )
    assert facts["decoders"] == manifest["decoders"]
    assert facts["pictures"] is True


def test_it_is_made_again_and_says_licence_and_size(
    folder: Path, shapes_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / MANIFEST).read_bytes()
    assert site.main([str(shapes_bundle.path), str(folder)]) == 0
    assert (folder / MANIFEST).read_bytes() == before
    said = capsys.readouterr().out
    assert shapes_bundle.licence in said
    assert f"addbench serve --static {folder}" in said


def test_headers_types_and_compression(folder: Path, address: str) -> None:
    for name, kind in (
        ("", "text/html"),
        ("worker.mjs", "text/javascript"),
        ("opened.js", "text/javascript"),
        ("ort/ort-wasm-simd-threaded.wasm", "application/wasm"),
        (MANIFEST, "application/json"),
    ):
        headers, body = get(address + name, **{"Accept-Encoding": "gzip"})
        assert headers["content-type"].partition(";")[0] == kind
        for key, value in HEADERS.items():
            assert headers[key] == value
        raw = (folder / (name or "index.html")).read_bytes()
        assert (gzip.decompress(body) if len(raw) > 1000 else body) == raw
    assert get(address + MANIFEST)[1] == (folder / MANIFEST).read_bytes()
    for wrong in ("../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "nothing.mjs"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(address + wrong)


def test_what_goes_over_the_wire_is_at_most_25_mb(folder: Path) -> None:
    """Measured as a page would load it with the largest runtime, gzipped as the server does."""
    manifest = json.loads((folder / MANIFEST).read_text())
    runtime_files = {
        name for name in manifest["files"] if name.startswith("ort/")
    } - {
        name for name in manifest["files"]
        if name.startswith("ort/") and not ("asyncify" in name or "webgpu" in name)
    }  # fmt: skip
    model = {
        name for name in manifest["files"]
        if name.startswith("model/") and "fp16.onnx" not in name and "_encoder." not in name
    }  # fmt: skip
    rest = {name for name in manifest["files"] if "/" not in name} | {
        "tokenizers/tokenizers.min.mjs"
    }
    total = sum(
        len(gzip.compress((folder / name).read_bytes(), 5)) for name in runtime_files | model | rest
    )
    assert len(runtime_files) == 3
    assert total <= 25e6


@pytest.mark.parametrize("content", [None, "{}", "[]", "no json"])
def test_another_folder_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(PreconditionError, match="no folder of"):
        static_app(tmp_path)


# ---- in a real browser


@pytest.fixture
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    if CHROMIUM is None or find_spec("playwright") is None:
        pytest.skip("no Chromium, or no playwright to drive it")
    from playwright.sync_api import sync_playwright

    sandbox = () if os.geteuid() else ("--no-sandbox",)
    with sync_playwright() as driver:
        launched = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*sandbox, *getattr(request, "param", ())]
        )
        yield launched
        launched.close()


def canvas(page: Any) -> np.ndarray:
    """The picture that the page shows."""
    script = "() => document.getElementById('picture').toDataURL()"
    content = page.evaluate(script).partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def drawn(page: Any, seed: int = 3) -> np.ndarray:
    page.locator("#seed").fill(str(seed))
    page.locator("#prompt").fill(PROMPT)
    text = "document.getElementById('{}').textContent"
    page.wait_for_function(f"{text.format('at')} === {text.format('of')}", timeout=600_000)
    return canvas(page)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(float) - other) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def test_a_page_draws_what_python_draws(browser: Any, address: str, shapes_bundle: Bundle) -> None:
    context = browser.new_context(bypass_csp=True)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address + "?device=wasm")
    page.wait_for_selector("body[data-state=ready]", timeout=120_000)
    assert page.evaluate("crossOriginIsolated") is True
    assert page.locator("#words").inner_text().startswith("WebAssembly, ")
    picture = drawn(page)
    with load_pipeline(str(shapes_bundle.path), "ort") as pipe:
        assert decibels(picture, pipe(PROMPT, steps=1, seed=3).images[0]) >= 80
    assert not problems
    assert {url for url in asked if not url.startswith((address, "blob:", "data:"))} == set()
    # What was loaded is kept: a second visit asks for none of the model.
    asked.clear()
    page.reload()
    page.wait_for_selector("body[data-state=ready]", timeout=120_000)
    assert not [url for url in asked if "/model/" in url or url.endswith(".wasm")]
    page.goto(address + "?device=tpu")
    page.wait_for_selector("body[data-state=lost]")
    assert "there is no device tpu" in page.locator("#words").inner_text()


def test_a_page_measures_itself(browser: Any, address: str, shapes_bundle: Bundle) -> None:
    page = browser.new_page()
    page.goto(address + "?bench=5&device=wasm&threads=1&steps=2&decoder=taesd")
    page.wait_for_selector("#bench", timeout=120_000)
    record = json.loads(page.locator("#bench").inner_text())
    assert record["bundle"] == shapes_bundle.hash
    assert record["provenance"] == "measured"
    assert (record["steps"], record["decoder"]) == (2, "taesd")
    assert (record["device"]["kind"], record["device"]["threads"]) == ("wasm", 1)
    assert "Chrom" in record["browser"]
    assert len(record["samples"]) == 5
    for sample in record["samples"]:
        stages = sample["text"] + sample["encode"] + sum(sample["unet"]) + sample["decode"]
        assert sample["nfe"] == len(sample["unet"]) == 2
        assert sample["text"] > 0.1, "no embedding is kept from another call"
        assert 0.5 * sample["total"] <= stages <= sample["total"] + 1


class Plain(SimpleHTTPRequestHandler):
    """A host that sends no headers of its own."""

    def guess_type(self, path: Any) -> str:
        return "text/javascript" if str(path).endswith(".mjs") else super().guess_type(path)

    def log_message(self, *_: object) -> None:
        pass


def test_a_host_without_headers(browser: Any, folder: Path, shapes_bundle: Bundle) -> None:
    handler = partial(Plain, directory=str(folder))
    files = site.page_files(shapes_bundle, coi=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{host.server_address[1]}/"
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("body[data-state=ready]", timeout=120_000)
        assert page.evaluate("crossOriginIsolated") is False
        assert "1 thread (the page is not isolated)" in page.locator("#words").inner_text()
        assert "coi.js" not in page.content()
        html = folder / "index.html"
        before = html.read_bytes()
        html.write_bytes(files["index.html"])
        try:
            page.goto(address)
            page.wait_for_function("crossOriginIsolated", timeout=120_000)
            page.wait_for_selector("body[data-state=ready]", timeout=120_000)
            assert "not isolated" not in page.locator("#words").inner_text()
        finally:
            html.write_bytes(before)
            host.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("browser", [SOFTWARE_GPU], indirect=True)
def test_webgpu_in_software_draws_what_python_draws(
    browser: Any, address: str, shapes_bundle: Bundle
) -> None:
    page = browser.new_context(bypass_csp=True).new_page()
    page.goto(address + "?device=webgpu")
    page.wait_for_selector("body[data-state=ready]", timeout=600_000)
    words = page.locator("#words").inner_text()
    assert words.startswith("WebGPU, google swiftshader, FP32, emulated"), words
    picture = drawn(page)
    assert page.locator("#words").inner_text() == words, "it did not fall to the CPU"
    with load_pipeline(str(shapes_bundle.path), "ort") as pipe:
        assert decibels(picture, pipe(PROMPT, steps=1, seed=3).images[0]) >= 80

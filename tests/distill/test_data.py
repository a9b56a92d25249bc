"""Folders and shards of pictures, and what is wrong with them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.errors import AddbenchError, PreconditionError
from distill.config import Data
from distill.data import ScenePool, batch_indices, open_source


def png(colour: tuple[int, int, int], size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0))):
        (tmp_path / f"{name}.png").write_bytes(png(colour))
        (tmp_path / f"{name}.txt").write_text(f"picture {name}\n")
    return tmp_path


def test_a_folder_of_pictures(folder: Path) -> None:
    source = open_source(Data(kind="folder", path=str(folder), size=16))
    assert list(source.captions) == ["picture a", "picture b"]
    pictures = source.pictures([1, 0])
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures[0, 1].min() == 1
    assert pictures[0, 0].max() == -1


def test_a_folder_with_a_table(folder: Path) -> None:
    rows = [{"file_name": "b.png", "text": "green"}, {"file_name": "a.png", "text": "red"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(Data(kind="folder", path=str(folder), size=16))
    assert list(source.captions) == ["green", "red"]
    assert source.pictures([0])[0, 1].min() == 1


def test_a_missing_caption_is_named(folder: Path) -> None:
    (folder / "b.txt").unlink()
    with pytest.raises(PreconditionError, match="1 of 2 pictures") as caught:
        open_source(Data(kind="folder", path=str(folder), size=16))
    assert "b.png" in caught.value.why


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_caption_is_a_missing_one(folder: Path, text: str) -> None:
    (folder / "b.txt").write_text(text)
    with pytest.raises(PreconditionError, match="1 of 2 pictures"):
        open_source(Data(kind="folder", path=str(folder), size=16))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "a.png", "te', "line 2"),
        ('{"text": "no picture"}', "line 2"),
        ('{"file_name": "a.png", "text": 7}', "line 2"),
        ('["a.png", "red"]', "line 2"),
        (r'{"file_name": "a.png", "text": "\ud800"}', "line 2"),
        ('{"file_name": "a.png", "text": "\xff"}', "metadata.jsonl cannot be read"),
        ('{"file_name": "gone.png", "text": "gone"}', "not there"),
        ('{"file_name": "a.png", "text": " "}', "1 of 2 pictures"),
    ],
)
def test_a_wrong_line_of_a_table_is_named(folder: Path, line: str, said: str) -> None:
    text = '{"file_name": "b.png", "text": "green"}\n' + line
    (folder / "metadata.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(PreconditionError, match=said):
        open_source(Data(kind="folder", path=str(folder), size=16))


def test_a_damaged_picture_is_named(folder: Path) -> None:
    content = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(content[: len(content) // 2])
    source = open_source(Data(kind="folder", path=str(folder), size=16))
    with pytest.raises(AddbenchError, match=r"b\.png cannot be read"):
        source.pictures([0, 1])


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="no folder"):
        open_source(Data(kind="folder", path=str(tmp_path / "none"), size=16))
    for kind in ("folder", "tar"):
        with pytest.raises(PreconditionError, match="no pictures"):
            open_source(Data(kind=kind, path=str(tmp_path), size=16))  # type: ignore[arg-type]


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_shards(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "0.tar",
        {
            "000.png": png((255, 0, 0)),
            "000.txt": b"red",
            "001.txt": b"green",
            "001.png": png((0, 255, 0)),
        },
    )
    write_shard(
        tmp_path / "1.tar", {"000.png": png((0, 0, 255)), "000.json": b'{"caption": "blue"}'}
    )
    source = open_source(Data(kind="tar", path=str(tmp_path), size=8))
    assert list(source.captions) == ["red", "green", "blue"]
    assert source.pictures([2, 1])[:, :, 0, 0].tolist() == [[-1, -1, 1], [-1, 1, -1]]


def test_damaged_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"000.png": png((1, 2, 3))})
    with pytest.raises(PreconditionError, match="have no caption"):
        open_source(Data(kind="tar", path=str(tmp_path), size=8))
    (tmp_path / "0.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(PreconditionError, match="cannot be read"):
        open_source(Data(kind="tar", path=str(tmp_path), size=8))


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_epochs_take_every_picture_once(length: int, batch: int, seed: int) -> None:
    seen = [i for step in range(length) for i in batch_indices(length, batch, step, seed)]
    for epoch in range(batch):
        assert sorted(seen[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_drawn_pictures_and_their_captions() -> None:
    from distill.judge import judge
    from distill.shapes import parse_caption

    data = Data(pool=60, loose=0.0, cut=0.0)
    source = ScenePool(data)
    pictures = source.pictures(range(60))
    assert pictures.shape == (60, 3, 64, 64)
    as_uint8 = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    right = [
        judge(picture, parse_caption(caption)).all_right
        for picture, caption in zip(as_uint8, source.captions, strict=True)
    ]
    assert np.mean(right) >= 0.98
    assert torch.equal(ScenePool(data).pictures([5]), source.pictures([5]))


def test_the_pool_has_captions_of_every_wording_and_no_held_out_scene() -> None:
    source = ScenePool(Data(pool=400))
    assert not any(scene.held_out for scene in source.scenes)
    plain = sum(
        text == scene.caption for text, scene in zip(source.captions, source.scenes, strict=True)
    )
    assert 120 <= plain <= 200  # 40%
    assert "" in source.captions

"""The bundle: a folder of graphs and all that a pipeline needs beside them, and its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from core.errors import AddbenchError, PreconditionError
from core.files import build_root, read_json, sha256_file, sha256_json, write_atomic, write_json
from export.models import CONTEXT_PART, MODELS, PARTS, Model, nearest_model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]

    from export.source.checkpoint import Checkpoint

SCHEMA = 1
PARITY = "parity.json"
"""The record of the comparison with torch; written by backends/check/parity.py."""
MANIFEST = "manifest.json"
WEIGHTS_ORDER = ("hub", "folder", "random")
DTYPES = ("fp16", "fp32")
Redraw = tuple[str, int, str, int]
"""Decoder, steps, encoder, and how many of the steps run on the picture."""


@dataclass(frozen=True)
class Spec:
    """An input or output of a graph. A named axis is a str in `shape`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class PartInfo:
    """One part of a bundle: its files, what it takes and gives, and what it is made of.

    `hash` identifies graph and weights; `ops` counts the graph's nodes by op type.
    """

    name: str
    graph: Path
    data: Path | None
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    hash: str
    weight_bytes: int
    ops: dict[str, int]


@dataclass(frozen=True)
class References:
    """What torch draws in FP32, uint8 [height, width, 3].

    Attributes:
        images: of `prompt` from noise, by (decoder, steps).
        redrawn: of `redraw_prompt` from `picture`, by (decoder, steps, encoder, steps that run).
    """

    seed: int
    prompt: str
    images: Mapping[tuple[str, int], Image]
    redraw_prompt: str = ""
    redrawn: Mapping[Redraw, Image] = field(default_factory=dict)

    @property
    def picture(self) -> Image:
        """The picture that images start from: that of the most steps, of the model's own decoder
        where there is one."""
        return self.images[max(self.images, key=lambda key: (key[0] == "vae", key[1]))]


class Bundle:
    """An exported model. `Bundle.open` checks it; the properties read its manifest."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open the bundle at `path`; PreconditionError when it is none or is not whole.

        Files are checked by size, graphs for weights that lie outside the bundle; `verify` hashes.
        """
        path = Path(path).absolute()
        if not path.exists():
            there = sorted(file.parent.name for file in build_root().glob(f"*/{MANIFEST}"))
            raise PreconditionError(
                f"there is no folder {path}",
                f"bundles in {build_root()}: {', '.join(there) or 'none'}",
                "pass a model's name or a bundle's folder; addbench export makes one",
            )
        if not (path / MANIFEST).is_file():
            raise PreconditionError(
                f"{path} is not a bundle", f"it holds no {MANIFEST}", "make one: addbench export"
            )
        try:
            manifest = read_json(path / MANIFEST)
        except AddbenchError as error:
            raise PreconditionError(error.what, error.why, _again(path)) from error
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            found = manifest.get("schema") if isinstance(manifest, dict) else None
            raise PreconditionError(
                f"{path} is not a bundle that this version reads",
                f"its manifest has schema {found}, this version reads {SCHEMA}",
                _again(path),
            )
        for name, entry in manifest["files"].items():
            _inside(path, name)
            file = path / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                state = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
                raise PreconditionError(
                    f"the bundle {path} is not whole",
                    f"{name} is {state}; the manifest says {entry['bytes']} bytes",
                    _again(path),
                )
        bundle = cls(path, manifest)
        for part in bundle.parts.values() if bundle.has_graphs else ():
            _check_external_data(part.graph)
        return bundle

    @property
    def name(self) -> str:
        return str(self.manifest["model"])

    @property
    def weights(self) -> str:
        """hub, folder or random."""
        return str(self.manifest["weights"])

    @property
    def dtype(self) -> str:
        """fp16 or fp32: of the weights and of the graphs' float inputs and outputs."""
        return str(self.manifest["dtype"])

    @property
    def has_graphs(self) -> bool:
        """False for a model that is drawn on the device when it is loaded (export/graphless.py)."""
        return bool(self.manifest.get("graphs", True))

    @property
    def licence(self) -> str:
        return str(self.manifest["licence"])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the images in pixels. The graphs are made for this size."""
        width, height = self.manifest["size"]
        return width, height

    @property
    def steps(self) -> int:
        return int(self.manifest["steps"])

    @property
    def guidance(self) -> float:
        return float(self.manifest["guidance"])

    @property
    def pooled(self) -> bool:
        return bool(self.manifest["pipeline"]["pooled"])

    @property
    def vae_scale(self) -> int:
        """Pixels along one side of a latent."""
        return int(self.manifest["pipeline"]["vae_scale"])

    @property
    def latent_channels(self) -> int:
        return int(self.manifest["pipeline"]["latent_channels"])

    @property
    def least_steps(self) -> int:
        """The least step count that the bundle's own scheduler takes."""
        return int(self.manifest["pipeline"].get("least_steps", 1))

    @property
    def scheduler_name(self) -> str:
        return str(self.manifest["pipeline"]["scheduler"])

    @property
    def model(self) -> Model:
        """The entry of the model as it was when the bundle was made."""
        pipeline = self.manifest["pipeline"]
        known: dict[str, Any] = {
            f.name: tuple(value) if isinstance(value := pipeline[f.name], list) else value
            for f in dataclasses.fields(Model)
            if f.name in pipeline  # an older bundle lacks what was added since
        }
        return Model(**known)

    @property
    def force_zeros(self) -> bool:
        """Whether the embeddings of an empty prompt are zeros, by the checkpoint's model index."""
        return bool(self.manifest["pipeline"].get("force_zeros", self.pooled))

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of the LoRA weights that were fused in at the export."""
        return tuple(entry["name"] for entry in self.manifest["source"].get("loras", ()))

    @cached_property
    def hash(self) -> str:
        """Identity of the content: graphs, weights, tokenizers, scheduler; not path or time."""
        files = self.manifest["files"]
        return sha256_json({name: files[name]["sha256"] for name in files})

    @cached_property
    def parts(self) -> dict[str, PartInfo]:
        entries = self.manifest["parts"]
        return {name: self._part(name, entries[name]) for name in PARTS if name in entries}

    def source(self, part: str) -> PartInfo:
        """The part whose graph `part` is compiled from: itself, but for what is split off one."""
        return self.parts["unet" if part == CONTEXT_PART else part]

    def _part(self, name: str, entry: dict[str, Any]) -> PartInfo:
        data = entry["data"]
        for file in (entry["graph"], data) if self.has_graphs else ():
            if file is not None and (
                file not in self.manifest["files"] or ".." in Path(file).parts
            ):
                raise PreconditionError(
                    f"the manifest of {self.path} names {file!r} as a file of {name}",
                    "it is not among the bundle's own files",
                    _again(self.path),
                )
        return PartInfo(
            name=name,
            graph=self.path / entry["graph"],
            data=self.path / data if data else None,
            inputs=_specs(entry["inputs"]),
            outputs=_specs(entry["outputs"]),
            hash=entry["hash"],
            weight_bytes=entry["weight_bytes"],
            ops=entry["ops"],
        )

    def scheduler(self, name: str | None = None) -> Any:
        """A fresh diffusers scheduler: schedulers hold the state of a run.

        Args:
            name: another class than the bundle's own, on the same config.
        """
        from export.source.scheduler import make_scheduler

        config = read_json(self.path / "scheduler" / "scheduler_config.json")
        return make_scheduler(config, name or self.scheduler_name)

    def tokenizers(self) -> list[Any]:
        """One transformers CLIP tokenizer for each text encoder."""
        from export.source.checkpoint import load_tokenizers

        return load_tokenizers(self.model, self.path)

    def checkpoint(self) -> Checkpoint:
        """Open again what the bundle was made from; CheckpointError when it is gone."""
        if not self.has_graphs and self.weights == "random":
            from export.source.drawn import drawn_checkpoint

            return drawn_checkpoint(self.model, self.manifest["source"]["seed"])
        from export.request import require_unchanged
        from export.source.checkpoint import reopen

        require_unchanged(self.manifest["request"])
        return reopen(self.model, self.manifest["source"], self.dtype)

    def references(self) -> References | None:
        """The reference images, or None when parity has not been run."""
        import numpy as np
        import PIL.Image

        index = self.path / "reference" / "reference.json"
        if not index.is_file():
            return None
        recorded = read_json(index)

        def read(entry: Mapping[str, Any]) -> Image:
            content = (index.parent / entry["file"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise AddbenchError(
                    f"the reference image {index.parent / entry['file']} has changed",
                    "its hash is not the one in reference.json",
                    f"draw it again: addbench parity --model {self.path} --force",
                )
            return np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))

        images = {}
        for key, entry in recorded["images"].items():
            decoder, _, steps = key.rpartition("-")
            images[decoder, int(steps)] = read(entry)
        redrawn = recorded.get("redrawn", {"prompt": "", "images": []})
        return References(
            recorded["seed"], recorded["prompt"], images, redrawn["prompt"],
            {(each["decoder"], each["steps"], each["encoder"], each["kept"]): read(each)
             for each in redrawn["images"]},
        )  # fmt: skip

    def verify(self) -> list[str]:
        """Hash everything again. Returns the problems found, empty when there are none."""
        problems = []
        for name, entry in self.manifest["files"].items():
            if sha256_file(self.path / name) != entry["sha256"]:
                problems.append(f"{name}: the content is not what was exported (sha256 differs)")
        for name, entry in self.manifest["parts"].items() if self.has_graphs else ():
            hashes = [self.manifest["files"][entry["graph"]]["sha256"]]
            if entry["data"]:
                hashes.append(self.manifest["files"][entry["data"]]["sha256"])
            if part_hash(hashes) != entry["hash"]:
                problems.append(f"{name}: the manifest contradicts itself (part hash)")
        try:
            self.references()
        except (AddbenchError, OSError, KeyError) as error:
            problems.append(f"reference images: {error}")
        return problems


def find_bundle(
    model: str,
    weights: str | None = None,
    dtype: str | None = None,
    size: tuple[int, int] | None = None,
) -> Bundle:
    """The bundle of a model by NAME (below the build folder), or the one at a PATH.

    When several fit: hub before folder before random, fp16 before fp32.

    Args:
        size: width and height in pixels; None for the bundle with the model's own.
    """
    own = bundle_of_checkpoint(Path(model).expanduser(), dtype, size)
    if own is not None:
        return own
    if os.sep in model or Path(model, MANIFEST).is_file():
        bundle = Bundle.open(Path(model))
        if size not in (None, bundle.size):
            raise PreconditionError(
                f"{model} cannot be run at {size_text(size)}",
                f"the graphs of this bundle are made for {size_text(bundle.size)}",
                f"drop --size, or export a bundle of that size: --size {size_text(size)}",
            )
        return bundle
    if weights not in (None, *WEIGHTS_ORDER):  # as export names what comes from a path or an id
        weights = "folder" if Path(weights).expanduser().is_dir() else "hub"
    for kind in WEIGHTS_ORDER if weights is None else (weights,):
        for one in DTYPES if dtype is None else (dtype,):
            for path in {bundle_path(model, kind, one, asked): 0 for asked in (size, None)}:
                if (path / MANIFEST).is_file():
                    bundle = Bundle.open(path)
                    if size in (None, bundle.size):
                        return bundle
    why = f"looked for {bundle_path(model, weights or '*', dtype or '*', size)}"
    advice = _export_command(model, weights, dtype, size)
    if model.split("+")[0] not in MODELS:
        why += f", and no model is called {model!r}"
        advice = nearest_model(model) or f"known models: {', '.join(MODELS)}"
        advice += "; a checkpoint's folder or file: addbench export --model PATH"
    raise PreconditionError(
        f"there is no bundle of {model}" + (f" at {size_text(size)}" if size else ""), why, advice
    )


def bundle_of_checkpoint(
    place: Path, dtype: str | None, size: tuple[int, int] | None
) -> Bundle | None:
    """The bundle that was exported from a checkpoint's folder or file; None if that is none."""
    is_folder = (place / "unet").is_dir() and not (place / MANIFEST).is_file()
    if not is_folder and not (place.is_file() and place.suffix == ".safetensors"):
        return None
    name = place.resolve().name if is_folder else place.stem
    kinds = DTYPES if dtype is None else (dtype,)

    def of_it(paths: Iterable[Path]) -> Iterator[Bundle]:
        for bundle in (Bundle.open(path) for path in paths if (path / MANIFEST).is_file()):
            source = bundle.manifest["source"].get("path")
            if source == str(place.resolve()) and size in (None, bundle.size):
                yield bundle

    for kind in kinds:
        plain = [bundle_path(name, "folder", kind, asked) for asked in (size, None)]
        if bundle := next(of_it(plain), None):
            return bundle
    # With LoRA weights and the like the name says more: one such bundle is the one that is meant.
    named = (build_root().glob(f"{escape(name)}+*-folder-{kind}*") for kind in kinds)
    more = [path for paths in named for path in sorted(paths)]
    fused = list(of_it(more))
    if len(fused) == 1:
        return fused[0]
    if fused:
        raise PreconditionError(
            f"there are {len(fused)} bundles of {place}, and none of it alone",
            "something is fused into each: " + ", ".join(bundle.path.name for bundle in fused),
            f"pass one's folder: --model {shlex.quote(str(fused[0].path))}",
        )
    raise PreconditionError(
        f"there is no bundle of {place}" + (f" at {size_text(size)}" if size else ""),
        f"looked for {bundle_path(name, 'folder', dtype or '*', size)}",
        f"export it first: addbench export --model {shlex.quote(str(place))}"
        + (f" --size {size_text(size)}" if size else ""),
    )


def _export_command(
    model: str, weights: str | None, dtype: str | None, size: tuple[int, int] | None
) -> str:
    from export.models import default_weights

    name, *fused = model.split("+")
    if weights is None:
        weights = default_weights(MODELS[name]) if name in MODELS else "hub"
    words = f"addbench export --model {name} --weights {weights} --dtype {dtype or 'fp16'}"
    words += f" --size {size_text(size)}" if size else ""
    for piece in fused:
        skipped = piece.removeprefix("clip-skip-")
        words += f" --clip-skip {skipped}" if skipped != piece else f" --lora {piece}.safetensors"
    return words


def export_again(bundle: Bundle) -> str:
    """The command that makes this bundle anew, in its place."""
    from export.request import Place

    asked = bundle.manifest["request"]
    model, place = str(asked["model"]), Place.of(asked.get("weights") or {})
    entry = MODELS.get(model)
    own = entry and place in (Place("hub", entry.checkpoint), Place("folder", path=entry.folder))
    weights = place.kind if own or place.kind == "random" else place.spec
    flags = {"--weights": weights if entry else None, "--dtype": bundle.dtype}
    if entry is None:
        model = str(place.local)
    for name in ("unet", "vae", "taesd"):
        flags[f"--{name}"] = Place.of(asked[name]).spec if asked.get(name) else None
    usual = entry and (entry.size, entry.size)
    flags["--size"] = size_text(bundle.size) if bundle.size != usual else None
    flags["--variant"] = asked.get("variant")
    flags["--seed"] = str(asked["seed"]) if asked.get("seed") else None
    flags["--clip-skip"] = str(asked["clip_skip"]) if asked.get("clip_skip") else None
    words = ["addbench", "export", "--model", model]
    words += [word for flag, value in flags.items() if value for word in (flag, value)]
    for lora in asked.get("loras") or ():
        words += ["--lora", f"{Place.of(lora['place']).spec}:{lora['weight']:g}"]
    for embedding in asked.get("embeddings") or ():
        token = f":{embedding['token']}" if embedding["token"] else ""
        words += ["--embedding", f"{Place.of(embedding['place']).spec}{token}"]
    if asked.get("allow_pickle"):
        words.append("--allow-pickle")
    return shlex.join([*words, "--out", str(bundle.path), "--force"])


def bundle_path(model: str, weights: str, dtype: str, size: tuple[int, int] | None = None) -> Path:
    """Where a bundle lies; `size` None for the one of the model's own size."""
    suffix = f"-{size_text(size)}" if size else ""
    return build_root() / f"{model}-{weights}-{dtype}{suffix}"


def size_text(size: tuple[int, int] | None) -> str:
    """`<width>x<height>`, as cells and folders name a size."""
    return "" if size is None else f"{size[0]}x{size[1]}"


def write_references(bundle: Bundle, references: References) -> None:
    """Write the reference images into the bundle: the PNGs, then the index that names them."""
    from PIL import Image

    def write(name: str, image: Any) -> dict[str, str]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        content = buffer.getvalue()
        write_atomic(bundle.path / "reference" / f"{name}.png", content)
        return {"file": f"{name}.png", "sha256": hashlib.sha256(content).hexdigest()}

    record: dict[str, Any] = {
        "seed": references.seed,
        "prompt": references.prompt,
        "images": {
            name: write(name, image)
            for (decoder, steps), image in references.images.items()
            for name in [f"{decoder}-{steps}"]
        },
    }
    if references.redrawn:
        record["redrawn"] = {
            "prompt": references.redraw_prompt,
            "images": [
                write(f"{decoder}-{kept}-of-{steps}-from-{encoder}", image)
                | {"decoder": decoder, "steps": steps, "encoder": encoder, "kept": kept}
                for (decoder, steps, encoder, kept), image in references.redrawn.items()
            ],
        }
    write_json(bundle.path / "reference" / "reference.json", record)


def part_hash(file_hashes: list[str]) -> str:
    """Identity of a part, from the sha256 of its graph and of its data file."""
    return sha256_json(file_hashes)


def _specs(entries: list[dict[str, Any]]) -> tuple[Spec, ...]:
    return tuple(Spec(e["name"], e["dtype"], tuple(e["shape"])) for e in entries)


def _again(path: Path) -> str:
    return f"export it again with --force, or delete {path}"


def _inside(folder: Path, location: str) -> None:
    """Refuse a relative path that is absolute or climbs out."""
    pure = PurePosixPath(location)
    if pure.is_absolute() or ".." in pure.parts or not location:
        raise PreconditionError(
            f"the bundle {folder} refers to {location!r}, which is outside it",
            "a bundle holds all its files; such a path could read any file of this machine",
            "do not use this bundle; export it again from a checkpoint you trust",
        )


def _check_external_data(graph: Path) -> None:
    """Every external-data path of `graph` is a plain file name in the graph's own folder."""
    for location in external_locations(graph):
        _inside(graph.parent, location)
        target = graph.parent / location
        if target.is_symlink() or not target.is_file():
            raise PreconditionError(
                f"{graph} keeps weights in {location!r}, which is no plain file of its folder",
                "the file is missing, or a link that may lead out of the bundle",
                _again(graph.parent.parent),
            )


def external_locations(graph: Path) -> set[str]:
    """Where `graph` keeps weights outside itself. Reads the graph, not the weights."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(graph, load_external_data=False)
    except DecodeError as error:
        raise PreconditionError(
            f"{graph} cannot be read as a graph", str(error), _again(graph.parent.parent)
        ) from error
    return {
        entry.value
        for tensor in _tensors(model.graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor in a GraphProto: initializers and attributes, subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t, *attribute.tensors]
            for subgraph in [attribute.g, *attribute.graphs]:
                yield from _tensors(subgraph)

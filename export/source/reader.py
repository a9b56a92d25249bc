"""The files of a checkpoint: found in folders or fetched from the hub, and checked to be whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.models import Model
from export.request import EmbeddingPlace, LoraPlace, Place
from export.source.layout import (
    COMPONENTS,
    LORA_FILES,
    TOKENIZER_FILES,
    CheckpointError,
    Stored,
    find_weights,
    pick_weights,
    read_config,
    require_pipeline,
    require_whole,
)
from export.source.taesd import encoder_of, require_halves

if TYPE_CHECKING:
    from export.source.embedding import Embedding
    from export.source.lora import Lora


@dataclass(frozen=True)
class Origin:
    """Where the module of one part is read from. `stored` None: random numbers of `seed`.

    `file`: one file that holds the weights, beside the config in `folder`.
    """

    folder: Path
    stored: Stored | None
    seed: int = 0
    file: Path | None = None

    def config(self) -> dict[str, Any]:
        return read_config(self.folder)


def tokenizer_names(model: Model) -> tuple[str, ...]:
    return ("tokenizer", "tokenizer_2")[: len(model.text_encoders)]


@dataclass(frozen=True)
class Reader:
    """Finds the files of a checkpoint: which variant, and whether pickles may be read."""

    dtype: str
    allow_pickle: bool
    variant: str | None = None

    def origin(self, folder: Path, part: str) -> Origin:
        stored = find_weights(folder, part, self.dtype, self.allow_pickle, self.variant)
        return Origin(folder, stored)

    def pipeline(
        self, place: Place, model: Model, without: str | None = None
    ) -> tuple[Path, Place]:
        """The folder of a checkpoint, downloaded if need be, and its place with the commit.

        Args:
            without: a part whose weights come from elsewhere.
        """
        names = tokenizer_names(model)
        if place.kind == "hub":
            folders = {COMPONENTS[p].folder: p for p in model.parts[:-2] if p != without}
            small = ["model_index.json", "scheduler/*.json", "*/config.json"]
            small += [f"{name}/{file}" for name in names for file in TOKENIZER_FILES]
            root, place = self._fetch(place, folders, small, "--weights")
        else:
            root = place.local
        require_pipeline(root, names)
        return root, place

    def autoencoder(
        self,
        part: str,
        root: Path,
        place: Place,
        asked: Place | None,
        default: str | None,
        config: Path,
    ) -> tuple[Origin, Place]:
        """The autoencoder asked for; else the checkpoint's own; else the default of the model.

        Args:
            config: the folder whose config a single file has.

        A VAE whose config does not deny `force_upcast` overflows in FP16: the model's default comes
        before it.
        """
        name = COMPONENTS[part].folder
        if asked is not None and (asked.kind == "file" or asked.file):
            file, asked = self.file(asked, f"--{name}")
            if name == "taesd":
                require_halves(file, self.allow_pickle)
            else:
                require_whole(file)
            return Origin(config, Stored((file.name,), None, False), file=file), asked
        own = root / name
        has_own = (own / "config.json").is_file()
        safe = name != "vae" or (has_own and not read_config(own).get("force_upcast", True))
        if asked is None and (default is None or (has_own and safe)):
            if place.kind == "hub":
                self._fetch(place, {name: part}, [f"{name}/config.json"], "--weights")
            return self.origin(own, part), Place("own")
        asked = asked or Place("hub", default)
        if asked.kind == "hub":
            small = ["config.json", f"{name}/config.json"]
            try:
                folder, asked = self._fetch(asked, {"": part, name: part}, small, f"--{name}")
            except CheckpointError as error:
                if not has_own:
                    raise
                next_step = f"{error.next}; or take the checkpoint's own: --{name} {own}"
                raise CheckpointError(error.what, error.why, next_step) from error
        else:
            folder = asked.local
        if not (folder / "config.json").is_file() and (folder / name).is_dir():
            folder = folder / name
        return self.origin(folder, part), asked

    def unet(self, config: Path, asked: Place) -> tuple[Origin, Place]:
        """A UNet that replaces the checkpoint's; one that is a single file has the `config`."""
        if asked.kind == "file" or asked.file:
            file, asked = self.file(asked, "--unet")
            require_whole(file)
            return Origin(config, Stored((file.name,), None, False), file=file), asked
        if asked.kind == "hub":
            small = ["config.json", "unet/config.json"]
            folder, asked = self._fetch(asked, {"": "unet", "unet": "unet"}, small, "--unet")
        else:
            folder = asked.local
        if not (folder / "config.json").is_file() and (folder / "unet").is_dir():
            folder = folder / "unet"
        return self.origin(folder, "unet"), asked

    def tokenizers(self, model: Model, root: Path) -> Path:
        """The folder with the tokenizers for a single file, which holds none: the entry's."""
        if model.checkpoint is None or (root / "tokenizer" / "tokenizer.json").is_file():
            return root
        small = [f"{name}/{file}" for name in tokenizer_names(model) for file in TOKENIZER_FILES]
        from export.source.hub import fetch

        def is_whole(names: list[str]) -> bool:
            return any(name.startswith("tokenizer/") for name in names)

        return fetch(model.checkpoint, None, small, lambda names: [], "--weights", is_whole)[0]

    def lora(self, asked: LoraPlace) -> tuple[Lora, LoraPlace]:
        """LoRA weights, downloaded if need be, and their place with the commit."""
        from export.source.lora import Lora

        file, place = self.file(asked.place, "--lora")
        require_whole(file)
        return Lora(file, asked.weight), LoraPlace(place, asked.weight)

    def embedding(
        self, asked: EmbeddingPlace, widths: Sequence[int]
    ) -> tuple[Embedding, EmbeddingPlace]:
        """Learned vectors, downloaded if need be, and their place with the commit."""
        from export.source.embedding import read_embedding

        file, place = self.file(asked.place, "--embedding")
        embedding = read_embedding(file, asked.token, widths, self.allow_pickle)
        return embedding, EmbeddingPlace(place, asked.token)

    def file(self, place: Place, flag: str) -> tuple[Path, Place]:
        """One .safetensors file: local, or of a repository; which one need be said if it has more.

        Returns:
            The file, and its place with the commit.
        """
        if place.kind == "file":
            return place.local, place
        from export.source.hub import fetch

        chosen: list[str] = []

        def choose(names: list[str]) -> list[str]:
            held = [name for name in names if name.endswith(".safetensors")]
            usual = [name for name in LORA_FILES if name in held]
            wanted = [place.file] if place.file else usual[:1] or held
            if len(wanted) != 1:
                raise CheckpointError(
                    f"{flag} {place.spec}: which of its files is meant?",
                    f"the repository holds {', '.join(held[:8]) or 'no .safetensors file'}",
                    f"name one: {flag} {place.id}/FILE.safetensors",
                )
            chosen.append(wanted[0])
            beside = {Path(wanted[0]).with_name("adapter_config.json").as_posix(),
                      encoder_of(wanted[0])}  # fmt: skip
            return [*wanted, *sorted(beside & {*names} - {*wanted})]

        def is_whole(names: list[str]) -> bool:
            return place.file in names and bool(choose(names))

        folder, commit = fetch(str(place.id), place.revision, [], choose, flag, is_whole)
        if not (folder / chosen[0]).is_file():
            raise CheckpointError(
                f"{flag} {place.spec}: {chosen[0]} cannot be had from the hub",
                "it is not in the repository, or there is no network and it is not cached here",
                f"download it where there is a network and pass it: {flag} FILE",
            )
        return folder / chosen[0], Place("hub", place.id, commit, file=chosen[0])

    def _fetch(
        self, place: Place, folders: dict[str, str], small: list[str], flag: str
    ) -> tuple[Path, Place]:
        from export.source.hub import fetch

        def choose(names: list[str]) -> list[str]:
            missing.clear()
            wanted = []
            for inside, part in folders.items():
                prefix = f"{inside}/" if inside else ""
                held = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
                stem = COMPONENTS[part].stem
                stored = pick_weights(held, stem, self.dtype, False, self.variant)
                if stored is None and self.allow_pickle:
                    stored = pick_weights(held, stem, self.dtype, True, self.variant)
                if stored is None:
                    missing.append(inside)
                else:
                    wanted += [prefix + file for file in stored.files]
            return wanted

        def is_whole(names: list[str]) -> bool:
            # An autoencoder or UNet lies at the top of its repository or in its folder.
            return bool(choose(names)) and (not missing or "" in folders)

        missing: list[str] = []
        folder, commit = fetch(str(place.id), place.revision, small, choose, flag, is_whole)
        return folder, Place("hub", place.id, commit)

"""What Triton's Python backend runs: the server's own drawer, for as many requests as wait.

`addbench export triton` copies this file into the repository. It runs in Triton's process for
Python, in an environment that holds addbench; pictures are the pipeline's, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton
from torch.utils.dlpack import from_dlpack

from backends.base import Shapes
from core.errors import AddbenchError, PreconditionError
from export.bundle import Bundle
from serve.artist import Artist, load
from serve.triton.parts import PartsBackend


class TritonPythonModel:
    """One instance of the model, as Triton calls it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm what the configuration's parameters say."""
        config = json.loads(args["model_config"])
        said = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        self.steps, self.decoder = int(said["steps"]), said["decoder"]
        self.batch = max(1, int(config["max_batch_size"]))
        job = {
            "bundle": str(folder / "bundle"), "backend": said["backend"],
            "decoders": [self.decoder], "all_decoders": True, "batch": self.batch,
            "scheduler": None, "guidance": None,
        }  # fmt: skip
        if said["form"] == "python":
            self.artist = load(job, lambda stage, share=None: None)
            return
        bundle = Bundle.open(folder / "bundle")
        backend, shapes = PartsBackend(config["name"], ask), Shapes(self.batch, *bundle.size)
        pipeline = backend.pipeline(bundle, self.decoder, shapes).prepare()
        self.artist = Artist({self.decoder: pipeline}, self.batch, fixed=False, pictures=False)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Draw what the requests ask for; those of the same steps are drawn together."""
        asked = [pictures_of(request, self.steps) for request in requests]
        images: list[list[Any]] = [[None] * len(pictures) for pictures in asked]
        failed: dict[int, AddbenchError] = {}
        by_steps: dict[int, list[tuple[int, int, dict[str, Any]]]] = {}
        for number, pictures in enumerate(asked):
            for place, (steps, picture) in enumerate(pictures):
                by_steps.setdefault(steps, []).append((number, place, picture))
        for steps, entries in by_steps.items():
            for start in range(0, len(entries), self.batch):
                some = entries[start : start + self.batch]
                order = {"steps": steps, "decoder": self.decoder, "strength": None,
                         "pictures": [picture for _, _, picture in some]}  # fmt: skip
                try:
                    drawn, _, _ = self.artist.draw(order, [], lambda: None)
                except AddbenchError as error:
                    failed |= {number: error for number, _, _ in some}
                    continue
                for (number, place, _), image in zip(some, drawn, strict=True):
                    images[number][place] = image
        return [
            refusal(failed[number]) if number in failed else response(images[number])
            for number in range(len(asked))
        ]

    def finalize(self) -> None:
        """Give back what was loaded."""
        for pipeline in self.artist.pipelines.values():
            pipeline.close()


def ask(model: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
    """Return outputs of another model of the repository."""
    request = triton.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[triton.Tensor(name, array) for name, array in inputs.items()],
    )
    response = request.exec()
    if response.has_error():
        raise AddbenchError(
            f"the model {model} of the repository failed", response.error().message(),
            "look at Triton's log",
        )  # fmt: skip
    tensors = {name: triton.get_output_tensor_by_name(response, name) for name in outputs}
    return {
        name: tensor.as_numpy() if tensor.is_cpu() else from_dlpack(tensor).cpu().numpy()
        for name, tensor in tensors.items()
    }


def pictures_of(request: Any, steps: int) -> list[tuple[int, dict[str, Any]]]:
    """Return steps and picture of every row of a request; seeds are 0, 1, ... where none is."""

    def given(name: str) -> list[Any] | None:
        tensor = triton.get_input_tensor_by_name(request, name)
        return None if tensor is None else list(tensor.as_numpy().reshape(-1))

    prompts = [bytes(text).decode("utf-8", "replace") for text in given("prompt") or ()]
    seeds = given("seed") or list(range(len(prompts)))
    counts = given("steps") or [steps] * len(prompts)
    return [
        (int(count), {"prompt": prompt, "seed": int(seed)})
        for prompt, seed, count in zip(prompts, seeds, counts, strict=True)
    ]


def response(images: Sequence[Any]) -> Any:
    """Return the answer that holds the pictures, [batch, height, width, 3]."""
    tensor = triton.Tensor("image", np.stack(images))
    return triton.InferenceResponse(output_tensors=[tensor])


def refusal(error: AddbenchError) -> Any:
    """Return the answer that says why there is no picture, in the three parts."""
    text = f"{error.what}: {error.why}; {error.next}"
    mine = isinstance(error, PreconditionError)
    kind = triton.TritonError.INVALID_ARG if mine else triton.TritonError.INTERNAL
    return triton.InferenceResponse(output_tensors=[], error=triton.TritonError(text, kind))

"""A model of which only the architecture is here: enough to model what it costs, not to run it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from core.errors import PreconditionError
from export.bundle import Bundle, PartInfo, find_bundle
from export.models import MODELS, Model


class Unbuilt(Bundle):
    """What a bundle would say of itself, from the model's entry. It has no files and no hash."""

    hash = ""

    def __init__(self, model: Model, size: tuple[int, int]) -> None:
        from export.source.checkpoint import open_checkpoint

        config = open_checkpoint(model, "random").scheduler_config()
        manifest = {
            "model": model.name,
            "weights": "none",
            "dtype": "fp16",
            "licence": model.licence,
            "size": size,
            "steps": model.steps,
            "guidance": model.guidance,
            "pipeline": asdict(model) | {"scheduler": config["_class_name"]},
            "source": {},
        }
        super().__init__(Path(model.architecture), manifest)

    @property
    def parts(self) -> dict[str, PartInfo]:
        """Names of the parts, without graphs."""
        return {
            part: PartInfo(part, self.path / part, None, (), (), "", 0, {})
            for part in self.model.parts
        }


def bundle_or_architecture(
    model: str, weights: str | None, dtype: str | None, size: tuple[int, int] | None
) -> Bundle:
    """The bundle if it is there, else what is known of the model without one.

    Raises:
        PreconditionError: there is neither.
    """
    try:
        return find_bundle(model, weights, dtype, size)
    except PreconditionError:
        if model not in MODELS:
            raise
        own = MODELS[model].size
        return Unbuilt(MODELS[model], size or (own, own))

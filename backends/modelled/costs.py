"""What the parts of a model cost at batch 1 in FP16: from its graphs, or from its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from export.bundle import Bundle
from export.cost import Cost, budget_cost, part_cost, part_cost_at
from export.models import PICTURE_PARTS, find_model

LISTED = "sdxl-turbo"
"""The model of export/budget.csv."""
SAME_PARTS = {"sdxl-base": LISTED}
"""Models whose parts are those of another, with other weights."""


@cache
def bundle_costs(bundle: Bundle) -> Mapping[str, Cost]:
    """Counted in the graphs; one without graphs is traced."""
    if not bundle.has_graphs:
        return traced_costs(bundle.model.name, bundle.size)
    return {
        name: part_cost(part.graph)
        for name, part in bundle.parts.items()
        if name not in PICTURE_PARTS  # no card is modelled with one
    }


@cache
def known_costs(model: str, size: tuple[int, int]) -> Mapping[str, Cost]:
    """Without a bundle: listed, at once, or traced on the meta device, which takes seconds.

    Raises:
        PreconditionError: there is no model of this name.
    """
    entry, (width, height) = find_model(model), size
    if SAME_PARTS.get(model, model) == LISTED and width == height:
        listed = {part: budget_cost(part, width) for part in entry.parts}
        found = {part: cost for part, cost in listed.items() if cost is not None}
        if len(found) == len(listed):
            return found
    return traced_costs(model, size)


def traced_costs(model: str, size: tuple[int, int]) -> Mapping[str, Cost]:
    from export.source.checkpoint import open_checkpoint

    entry = find_model(model)
    checkpoint = open_checkpoint(entry, "random")
    return {part: part_cost_at(checkpoint, part, 1, *size) for part in entry.parts}

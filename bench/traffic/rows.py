"""A measurement under load as a run that the rest of the toolkit reads: a header and rows.

A measurement is a row of the cell that was under load, with its `scenario`: `addbench show`,
`compare`, `claims` and `publish` read it like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.pipeline.recipe import make_recipe
from backends.pipeline.session import decoders
from backends.registry import parse_backend
from bench.machine import environment
from bench.rows import stats
from bench.rows.cell import Cell
from bench.rows.fields import OK
from bench.rows.store import RowWriter, Run, create_run, make_row
from bench.run.measure import StopRule
from bench.run.plan import Candidate, Plan
from bench.run.request import Sampling
from export.bundle import Bundle, size_text

NO_CHECK = {"status": "no_reference", "psnr_db": None, "ssim": None}


class LoadRun:
    """The run of a load: one row for each measurement, written as it is done.

    Args:
        backend: as `--backend` takes it; of a server, that of its worker.
        served: what the server says of itself; None for a pipeline in process.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        runs: Path,
        command: Sequence[str],
        *,
        decoder: str | None,
        steps: int,
        seconds: float,
        requests: int,
        provenance: str,
        served: Mapping[str, Any] | None,
    ) -> None:
        chosen, recipe = parse_backend(backend), make_recipe(bundle)
        candidate = Candidate(backend, chosen, chosen.probe())
        self.bundle, self.provenance = bundle, provenance
        self.requests, self.over = requests, " over http" if served is not None else ""
        self.cell = Cell(
            model=bundle.name,
            weights=bundle.weights,
            backend=chosen.name,
            options=candidate.key.partition(":")[2],
            device=chosen.device,
            precision=chosen.precision(bundle),
            storage=chosen.storage(bundle),
            size=size_text(bundle.size),
            batch=1,
            decoder=decoder or decoders(bundle)[0],
            steps=steps,
            scheduler=recipe.scheduler,
            guidance=recipe.guidance,
            guidance_mode=recipe.guidance_mode,
        )
        rule = StopRule(requests, seconds, max(seconds, StopRule.max_time), warmup=0)
        plan = Plan(bundle, (candidate,), (), Sampling(rule, 1), environment.collect())
        self.run: Run = create_run(runs, plan.header(command))

    def keep(
        self, scenario: str, samples_ms: Sequence[float], figures: Mapping[str, Any], begun: str
    ) -> None:
        """Write the row of a measurement.

        Args:
            samples_ms: of the requests that were answered with a picture.
            figures: of `figures_of` or `type_all`.
            begun: when, in UTC.
        """
        cell = replace(self.cell, scenario=scenario + self.over)
        if cell not in self.run.plan:
            header = replace(self.run.header, plan=(*self.run.plan, cell))
            self.run = self.run.with_header(header)
        result = {
            **{
                name: rounded(value) for name, value in vars(stats.summarise(samples_ms, 1)).items()
            },
            "samples_ms": [rounded(sample) for sample in samples_ms],
            "images_per_s": rounded(figures["per_second"]),
            "flags": stats.flags_of(samples_ms, min(self.requests, len(samples_ms)), None),
            "image_check": {**NO_CHECK, **figures.get("image_check", {})},
            "load_avg": environment.load_average(),
            "time_utc": begun,
            **outcome(figures),
        }
        if scenario == "offline" and figures["per_second"]:
            result["period_ms"] = rounded(1e3 / figures["per_second"])
        context = {
            "run": self.run.name,
            "bundle_hash": self.bundle.hash,
            "provenance": self.provenance,
            **environment.git_state(),
        }
        with RowWriter(self.run.path) as writer:
            writer.append(make_row(cell, 0, context, result))


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def outcome(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Status and error of a measurement's row."""
    if figures["ok"]:
        return {"status": OK}
    if figures.get("image_check", {}).get("status") == "mismatch":
        return {
            "status": "mismatch",
            "error": {
                "type": "Mismatch",
                "what": "the reference's picture differs from torch FP32",
                "why": f"PSNR {figures['image_check']['psnr_db']} dB",
                "next": "addbench parity names the part",
            },
        }
    return {
        "status": "failed",
        "error": {
            "type": "LoadFailed",
            "what": f"{figures['failed']} requests were refused or failed"
            if figures["failed"]
            else "LoadGen's figures are apart from ours",
            "why": "load.json of the run says how far",
            "next": "look at what the server printed; measure on a quiet machine",
        },
    }

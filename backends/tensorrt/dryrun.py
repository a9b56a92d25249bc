"""A folder with all that a person with TensorRT needs to build the plans: graphs and a script.

trtexec.sh   one command a plan; needs TensorRT and a GPU, and none of ours
onnx/        the lowered graphs with their weights
plans/       what the script leaves
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backends.artifacts.portable import lower_apart
from backends.base import Shapes
from backends.tensorrt.probe import OLDEST_FOR
from backends.tensorrt.request import make_request, trtexec
from core.amounts import bytes_text
from core.errors import PreconditionError
from core.files import require_disk, write_atomic
from export.bundle import Bundle

if TYPE_CHECKING:
    from backends.trt import TrtBackend

SCRIPT = "trtexec.sh"
HEAD = """\
#!/usr/bin/env bash
# {name}: builds each plan with trtexec. Not yet run on a GPU.
set -euo pipefail
cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"
command -v trtexec > /dev/null || {{
  echo "error: there is no trtexec" >&2
  echo "  why:  it comes with TensorRT, and is not on the PATH" >&2
  echo "  next: run this in one of NVIDIA's TensorRT containers" >&2
  exit 2
}}
mkdir -p plans
"""


def write(
    backend: TrtBackend, bundle: Bundle, jobs: Sequence[tuple[str, Shapes]], folder: Path
) -> list[str]:
    """Write the folder for parts and their shapes; return the lines to print.

    Raises:
        PreconditionError: the precision takes calibrated scales, or the disk is too small.
    """
    if backend.options["precision"] in OLDEST_FOR:
        raise PreconditionError(
            f"precision {backend.options['precision']} has no folder to take along",
            "its scales are calibrated from recorded tensors first",
            "leave --out out: the printed commands calibrate, then build",
        )
    release = backend.release()
    sizes = [bundle.source(part).weight_bytes for part, _ in jobs]
    require_disk(folder, sum(sizes), f"the graphs of {bundle.path.name}")
    print(f"writing {bytes_text(sum(sizes))} of graphs into {folder}", file=sys.stderr, flush=True)
    commands = []
    for part, shapes in jobs:
        request = make_request(bundle, part, shapes, backend.options, release)
        name = f"{part}-batch{backend.texts['batch'] if request.shapes else shapes.batch}"
        graph, plan = Path("onnx", name, "model.onnx"), Path("plans", f"{name}.plan")
        lower_apart(bundle.source(part).graph, request.profile, folder / graph)
        commands.append(shlex.join(trtexec(request, release, graph, plan, Path("timing.cache"))))
    script = folder / SCRIPT
    write_atomic(script, HEAD.format(name=bundle.path.name) + "\n".join(commands) + "\n")
    os.chmod(script, 0o755)
    return [f"wrote {script}; the folder is whole, copy it to a machine with TensorRT", *commands]

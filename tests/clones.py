"""A checkout of its own for commands as people type them, with an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import warm
from folders import lay_out
from safetensors.torch import save_file

from core.files import ROOT
from export.bundle import Bundle
from export.models import MODELS
from export.source.checkpoint import open_checkpoint


def make_clone(folder: Path, tiny: Bundle, shapes: Bundle) -> None:
    """Copy the checkout: bundles of the default model and the tiny one, small checkpoints."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    subprocess.run(["git", *author, "commit", "-qm", "clone"], cwd=folder, check=True)
    shutil.copytree(tiny.path, folder / "build" / "tiny-sdxl-random-fp16")
    shutil.copytree(shapes.path, folder / "build" / "shapes-turbo-folder-fp16")
    lay_out_checkpoints(folder)
    make_environment(folder)


def make_environment(folder: Path) -> None:
    """The clone's own `.venv`, as `make install` leaves it, over the packages of the running one.

    Nothing that a command installs can reach the environment that the tests run in.
    """
    environment = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("-packages")]
    (packages / "clone.pth").write_text("\n".join([str(folder), *borrowed]) + "\n")
    script = environment / "bin" / "addbench"
    script.write_text(f'#!/bin/sh\nexec "{environment}/bin/python" -m addbench "$@"\n')
    script.chmod(0o755)
    for extra in ("cpu", "types"):
        (environment / f".ready-{extra}").touch()
    warm.SEATS.add((str(environment / "bin" / "python"), folder.resolve()))


def lay_out_checkpoints(folder: Path) -> None:
    """What the README's commands find on the hub or in folders, small: SDXL's topology throughout.

    The shipped model is it for SDXL-Turbo; the LoRA's are weights for one layer.
    """
    shipped = ROOT / "models" / "shapes-turbo"
    hub = folder / "build" / "hub"
    lay_out(hub, "test/tiny", shipped, "1" * 40)
    shutil.copytree(shipped, folder / "my-sdxl-turbo", ignore=shutil.ignore_patterns("taesd"))
    shutil.copytree(shipped / "vae", folder / "sdxl-vae-fp16-fix")
    shutil.copytree(shipped / "taesd", folder / "taesdxl")
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    unet = open_checkpoint(MODELS["tiny-sd"], "random").skeleton("unet")
    out_width, in_width = unet.get_parameter(f"{layer}.weight").shape
    lora = folder / "build" / "lora"
    lora.mkdir()
    save_file(
        {f"unet.{layer}.lora_A.weight": torch.ones(2, in_width),
         f"unet.{layer}.lora_B.weight": torch.ones(out_width, 2)},
        lora / "pytorch_lora_weights.safetensors",
    )  # fmt: skip
    lay_out(hub, "latent-consistency/lcm-lora-sdxl", lora, "2" * 40)


def run_in(clone: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """In the clone: its own code and hub cache, no network, no GPU."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ADDBENCH_", "MAKE", "PYTHONPATH", "VENV"))
    }
    own = {
        "PATH": f"{clone / '.venv' / 'bin'}:{kept['PATH']}",
        "HF_HUB_CACHE": str(clone / "build" / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if words[0] == "addbench":
        words = [str(clone / ".venv" / "bin" / "python"), "-m", *words]
    return subprocess.run(
        words, cwd=clone, env=kept | own, capture_output=True, text=True, timeout=300
    )

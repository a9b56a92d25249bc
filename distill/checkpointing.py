"""The state of a stage that can stop and go on: written whole or not at all.

A checkpoint is a folder `step-NNNNNN` of accelerate's state (networks, optimizers, averages, random
states) and `state.json`, which names the configuration it belongs to. A new one is complete
before the old one is removed, so a killed process or a full disk leaves the last good one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from core.errors import AddbenchError, PreconditionError
from core.files import read_json, staged_folder, write_json

STATE = "state.json"
SHARDS = "shards"


@dataclass(frozen=True)
class State:
    """`step`: iterations done; `seconds`: spent on them, over all resumes; `sharded`: networks lie
    in the checkpoint in shards."""

    step: int
    seconds: float
    config: str
    sharded: bool = False


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = sorted(path for path in folder.glob("step-*") if (path / STATE).exists())
    return complete[-1] if complete else None


@contextlib.contextmanager
def writing(what: str, folder: Path, kept: str) -> Iterator[None]:
    """Turn what libraries raise on a full or broken disk into words.

    Raises:
        AddbenchError: `what` could not be written below `folder`; `kept` says what survives.
    """
    try:
        yield
    # safetensors raises an error type of its own, torch.save a RuntimeError.
    except Exception as error:
        if isinstance(error, AddbenchError) or not _is_write_error(error):
            raise
        raise AddbenchError(
            f"{what} could not be written",
            f"{error}; {kept}",
            f"free some room on the disk of {folder} and run the same command: it resumes",
        ) from error


def save(
    accelerator: Any, folder: Path, state: State, shards: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint on every process together.

    `shards`: what each process writes a part of (Stateful of torch.distributed.checkpoint).

    Raises:
        AddbenchError: it could not be written (a full disk, say); the previous one survives.
    """
    target = folder / f"step-{state.step:06d}"
    previous = latest(folder)
    if previous is not None and previous.name == target.name:
        return
    kept = "nothing was saved before" if previous is None else f"{previous} is intact"
    with writing(f"the checkpoint of step {state.step}", folder, kept), \
            contextlib.ExitStack() as stack:  # fmt: skip
        scratch = [target]
        if accelerator.is_main_process:
            scratch = [stack.enter_context(staged_folder(target))]
        scratch = _from_main(accelerator, scratch)
        accelerator.save_state(str(scratch[0]), safe_serialization=True)
        if shards:
            save_shards(dict(shards), checkpoint_id=scratch[0] / SHARDS)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(scratch[0] / STATE, asdict(state))
    if accelerator.is_main_process:
        for old in folder.glob("step-*"):
            if old.name != target.name:
                shutil.rmtree(old, ignore_errors=True)


def resumable(folder: Path, config: str, sharded: bool | None = None) -> tuple[Path, State] | None:
    """The newest checkpoint that a stage would go on from, with its state; None without one.

    Args:
        sharded: whether its networks lie in shards; None where that is not known yet.

    Raises:
        PreconditionError: it belongs to another configuration, or is in shards and they are not
            asked for (or the other way round).
    """
    newest = latest(folder)
    if newest is None:
        return None
    state = State(**read_json(newest / STATE))
    if state.config != config:
        raise PreconditionError(
            f"{newest} belongs to another configuration",
            f"its hash is {state.config[:12]}, this command's is {config[:12]}",
            "run with the settings it was started with, pick another --run, or delete the folder",
        )
    if sharded is not None and state.sharded != sharded:
        raise PreconditionError(
            f"{newest} was written {'with' if state.sharded else 'without'} --shard",
            "whole networks and shards are kept in different files",
            f"run {'with' if state.sharded else 'without'} --shard, or pick another --run",
        )
    return newest, state


def resume(
    accelerator: Any, folder: Path, config: str, shards: Mapping[str, Any] | None = None
) -> State | None:
    """Load the newest checkpoint into what the accelerator prepared; None when there is none.

    Raises:
        PreconditionError: see `resumable`.
    """
    checkpoint = resumable(folder, config, bool(shards))
    if checkpoint is None:
        return None
    newest, state = checkpoint
    accelerator.load_state(str(newest))
    if shards:
        load_shards(dict(shards), checkpoint_id=newest / SHARDS)
    return state


def _is_write_error(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, OSError) or any(
        sign in text
        for sign in ("no space left", "file write failed", "unexpected pos", "i/o error")
    )


def _from_main(accelerator: Any, values: list[Path]) -> list[Path]:
    if accelerator.num_processes == 1:
        return values
    from accelerate.utils import broadcast_object_list

    shared: list[Path] = broadcast_object_list(values)
    return shared

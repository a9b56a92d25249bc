"""Files from the model hub: huggingface_hub's own cache, login and revisions."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from export.source.layout import CheckpointError

TIMEOUT_S = 10.0
"""How long the hub may take to answer the one question that decides if there is a network."""
COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(
    repo: str,
    revision: str | None,
    small: Sequence[str],
    choose: Callable[[list[str]], list[str]],
    flag: str,
    is_whole: Callable[[list[str]], bool],
) -> tuple[Path, str]:
    """Have a repository's files in the hub cache, downloading those that are missing.

    A commit whose files are here is used without asking. Without network the cached snapshot
    serves, and after one connection error no other file of this process asks again.

    Args:
        small: patterns of the configs and tokenizers.
        choose: from all file names of the repository to the weights that are wanted.
        flag: how the user named the repository, for the message.
        is_whole: whether these files are all that is wanted.

    Returns:
        The snapshot's folder and the commit that `revision` (default: main) stands for.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if revision and COMMIT.fullmatch(revision):
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        folder = folder / "snapshots" / revision
        if folder.is_dir() and is_whole(names_in(folder)):
            return folder, revision
    try:
        names: list[str] | None = None
        if not constants.HF_HUB_OFFLINE:
            try:
                info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)
                revision = str(info.sha)
                names = [file.rfilename for file in info.siblings or ()]
            except (GatedRepoError, RepositoryNotFoundError):
                raise
            except Exception as error:  # the library lets many types through: its own, httpx's
                go_offline(error)
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(small),
                              local_files_only=names is None)
        )  # fmt: skip
        wanted = choose(names_in(folder) if names is None else names)
        if wanted and names is not None:
            snapshot_download(repo, revision=folder.name, allow_patterns=wanted)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise _unavailable(
            repo, flag, "the hub does not show it without the right login"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # the library lets many types through: its own, httpx's, OSError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise _unavailable(repo, flag, f"not cached here, and the hub says: {reason[0]}") from error
    return folder, folder.name


def names_in(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def go_offline(error: Exception) -> None:
    """Ask the hub for nothing more in this process, and say so once."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    print(f"the hub does not answer ({reason}): from here on what is cached serves",
          file=sys.stderr)  # fmt: skip


def _unavailable(repo: str, flag: str, why: str) -> CheckpointError:
    ways = [
        f"download {repo} where there is a network and pass its folder: {flag} PATH",
        "log in if it is gated or private: hf auth login",
        "time the architecture without the checkpoint: --weights random",
    ]
    return CheckpointError(
        f"the checkpoint {repo} cannot be had from the hub", why, "; or ".join(ways)
    )

"""Files from the model hub: huggingface_hub's own cache, login and revisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from export.source.layout import CheckpointError


def fetch(
    repo: str,
    revision: str | None,
    small: Sequence[str],
    choose: Callable[[list[str]], list[str]],
    flag: str,
) -> tuple[Path, str]:
    """Have a repository's files in the hub cache, downloading those that are missing.

    Without network the cached snapshot serves.

    Args:
        small: patterns of the configs and tokenizers, fetched first: they resolve the revision.
        choose: from all file names of the repository to the weights that are wanted.
        flag: how the user named the repository, for the message.

    Returns:
        The snapshot's folder and the commit that `revision` (default: main) stands for.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(small)))
        commit = folder.name
        try:
            names = HfApi().list_repo_files(repo, revision=commit)
        except Exception:  # any failure to reach the hub: what is cached is what there is
            names = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
        wanted = choose(names)
        if wanted:
            snapshot_download(repo, revision=commit, allow_patterns=wanted)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise _unavailable(
            repo, flag, "the hub does not show it without the right login"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # the library lets many types through: its own, httpx's, OSError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise _unavailable(repo, flag, f"not cached here, and the hub says: {reason[0]}") from error
    return folder, commit


def _unavailable(repo: str, flag: str, why: str) -> CheckpointError:
    ways = [
        f"download {repo} where there is a network and pass its folder: {flag} PATH",
        "log in if it is gated or private: hf auth login",
        "time the architecture without the checkpoint: --weights random",
    ]
    return CheckpointError(
        f"the checkpoint {repo} cannot be had from the hub", why, "; or ".join(ways)
    )

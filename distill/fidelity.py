"""FID between sets of pictures: over this project's own small network, or the standard one.

The own figure (`fid_shapes`) takes the features of `FidFeatures`, a network of another
architecture and seed than the discriminator's. It compares only with itself: its scale is not
the published FID's. The standard FID and CLIP score need torchmetrics and local weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from core.errors import PreconditionError
from distill.shapes import Pictures

Features = NDArray[np.float64]

LEAST_PICTURES = 512
"""Eight times the width of the own network's features. With fewer pictures the covariance, and with
it the figure, is mostly the sample's: the same model has 7.9 by 200 captions, 4.1 by 600."""


@torch.no_grad()
def features(network: nn.Module, pictures: Pictures) -> Features:
    """[n, width] of uint8 pictures [n, size, size, 3]."""
    parts = []
    for start in range(0, len(pictures), 256):
        part = torch.from_numpy(pictures[start : start + 256]).permute(0, 3, 1, 2).float()
        parts.append(network(part / 127.5 - 1).double().numpy())
    return np.concatenate(parts)


def frechet_distance(first: Features, second: Features) -> float:
    """Squared Frechet distance of two Gaussians fitted to the features.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)); the trace of the root is the sum of the
    roots of the eigenvalues of S_1 S_2, which are real and not negative. Biased upwards when
    there are few samples: give their number beside it (`LEAST_PICTURES`).
    """
    difference = first.mean(0) - second.mean(0)
    first_covariance, second_covariance = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(first_covariance @ second_covariance).real.clip(0))
    distance = float(
        difference @ difference
        + np.trace(first_covariance)
        + np.trace(second_covariance)
        - 2 * roots.sum()
    )
    return max(distance, 0.0)


def frechet_deviation(first: Features, second: Features, resamples: int = 100) -> float:
    """Standard error of `frechet_distance`: its deviation over resampled pairs (bootstrap)."""
    rng = np.random.default_rng(0)
    distances = []
    for _ in range(resamples):
        chosen = rng.integers(len(first), size=len(first))
        distances.append(frechet_distance(first[chosen], second[chosen]))
    return float(np.std(distances, ddof=1))


def standard_scores(
    drawn: Pictures,
    real: Pictures,
    captions: list[str],
    *,
    inception: Path | None,
    clip: Path | None,
) -> dict[str, float]:
    """The standard FID (through torchmetrics) and CLIP score, from weights on this disk.

    Args:
        inception: torch-fidelity's `pt_inception-2015-12-05-6726825d.pth`.
        clip: folder of a CLIP model in transformers format.

    Raises:
        PreconditionError: torchmetrics or the weights are not here.
    """
    for path in (inception, clip):
        if path is not None and not path.exists():
            raise PreconditionError(
                f"there are no weights at {path}",
                "the standard scores use local weights only",
                "download them and pass their path",
            )
    scores = {}
    if inception is not None:
        scores["fid"] = _standard_fid(drawn, real, inception)
    if clip is not None:
        scores["clip_score"] = clip_score(drawn, captions, clip)
    return scores


def _standard_fid(drawn: Pictures, real: Pictures, inception: Path) -> float:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        fid = FrechetInceptionDistance(feature_extractor_weights_path=str(inception))
    # torchmetrics raises ModuleNotFoundError where torch-fidelity is missing; RuntimeError comes of
    # a torchvision that was built for another torch.
    except (ImportError, RuntimeError) as error:
        raise PreconditionError(
            "the standard FID needs torchmetrics, torch-fidelity and torchvision",
            str(error),
            "pip install -e '.[scores]', with the torchvision of your torch's own index",
        ) from error
    for pictures, is_real in ((real, True), (drawn, False)):
        fid.update(torch.from_numpy(pictures).permute(0, 3, 1, 2), real=is_real)
    return float(fid.compute())


@torch.no_grad()
def clip_score(drawn: Pictures, captions: list[str], folder: Path) -> float:
    """100 x the mean cosine of each picture and its caption, not below 0.

    As torchmetrics defines it, on transformers itself: torchmetrics 1.9 does not read what
    transformers 5 returns.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PreconditionError(
            f"{folder} cannot be loaded as a CLIP model",
            str(error),
            "download a CLIP in transformers format, with its processor, and pass its folder",
        ) from error
    cosines = []
    for start in range(0, len(drawn), 32):
        part = slice(start, start + 32)
        asked = processor(
            text=captions[part], images=list(drawn[part]), return_tensors="pt",
            padding=True, truncation=True,
        )  # fmt: skip
        out = model(**asked)
        # Both come normalised.
        cosines.append((out.image_embeds * out.text_embeds).sum(1))
    return max(0.0, float(100 * torch.cat(cosines).mean()))

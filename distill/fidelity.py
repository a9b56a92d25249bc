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


@torch.no_grad()
def features(network: nn.Module, pictures: Pictures) -> Features:
    """[n, width] of uint8 pictures [n, size, size, 3]."""
    found = []
    for start in range(0, len(pictures), 256):
        part = torch.from_numpy(pictures[start : start + 256]).permute(0, 3, 1, 2).float()
        found.append(network(part / 127.5 - 1).double().numpy())
    return np.concatenate(found)


def frechet_distance(first: Features, second: Features) -> float:
    """Squared Frechet distance of two Gaussians fitted to the features.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)); the trace of the root is the sum of the
    roots of the eigenvalues of S_1 S_2, which are real and not negative. Biased upwards when
    there are few samples: give their number beside it, at least ten times the width.
    """
    difference = first.mean(0) - second.mean(0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(one @ two).real.clip(0))
    distance = float(difference @ difference + np.trace(one) + np.trace(two) - 2 * roots.sum())
    return max(distance, 0.0)


def frechet_deviation(first: Features, second: Features, resamples: int = 100) -> float:
    """Standard error of `frechet_distance`: its deviation over resampled pairs (bootstrap)."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        chosen = rng.integers(len(first), size=len(first))
        found.append(frechet_distance(first[chosen], second[chosen]))
    return float(np.std(found, ddof=1))


def standard_scores(
    made: Pictures,
    real: Pictures,
    captions: list[str],
    *,
    inception: Path | None,
    clip: Path | None,
) -> dict[str, float]:
    """The standard FID and CLIP score through torchmetrics, from weights on this disk.

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
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.multimodal.clip_score import CLIPScore
    except ImportError as error:
        raise PreconditionError(
            "the standard FID and CLIP score need torchmetrics",
            str(error),
            "pip install 'torchmetrics[image,multimodal]'",
        ) from error
    scores = {}
    made_tensor, real_tensor = (torch.from_numpy(set_).permute(0, 3, 1, 2) for set_ in (made, real))
    if inception is not None:
        fid = FrechetInceptionDistance(feature_extractor_weights_path=str(inception))
        fid.update(real_tensor, real=True)
        fid.update(made_tensor, real=False)
        scores["fid"] = float(fid.compute())
    if clip is not None:
        score = CLIPScore(model_name_or_path=str(clip))
        score.update(list(made_tensor), captions)
        scores["clip_score"] = float(score.compute())
    return scores

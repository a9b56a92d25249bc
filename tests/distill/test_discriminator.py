"""The heads: what they are told and where, and that the feature network stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from core.errors import PreconditionError
from distill.discriminator import Condition, Discriminator
from distill.features import FidFeatures, PictureFeatures, TransformerFeatures
from distill.losses import hinge_discriminator, hinge_generator, r1_penalty

CHANNELS, SIDES = (16, 24), (16, 4)


def heads(text: str | None = "tokens", image: int = 8) -> Discriminator:
    torch.manual_seed(0)
    made = Discriminator(CHANNELS, SIDES, width=32, text=text, text_dim=12, image_dim=image)
    return made.eval()


def maps(seed: int = 0, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, s, s, generator=generator)
        for c, s in zip(CHANNELS, SIDES, strict=True)
    ]


def told(seed: int = 1, batch: int = 2) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6)[None] < torch.tensor([[4], [6]])[:batch]
    return Condition(
        tokens=torch.randn(batch, 6, 12, generator=generator),
        mask=mask,
        pooled=torch.randn(batch, 12, generator=generator),
        image=torch.randn(batch, 8, generator=generator),
    )


def test_a_verdict_for_each_place() -> None:
    assert [tuple(x.shape) for x in heads()(maps(), told())] == [(2, 16, 16), (2, 4, 4)]


@pytest.mark.parametrize("text", ["tokens", "pooled"])
def test_the_caption_counts_differently_in_different_places(text: str) -> None:
    network = heads(text)
    changes = [
        a - b for a, b in zip(network(maps(), told(1)), network(maps(), told(2)), strict=True)
    ]
    for change in changes:
        assert change.abs().max() > 1e-4
        assert change.flatten(1).std(1).min() > 1e-5


def test_where_the_same_features_stand_matters() -> None:
    """A picture moved by half its side is not the same to a head that is told the caption."""
    network, features = heads(), [torch.ones_like(x) for x in maps()]
    for logits in network(features, told()):
        assert logits.flatten(1).std(1).min() > 1e-5


def test_padding_tokens_do_not_count() -> None:
    condition = told()
    assert condition.tokens is not None
    assert condition.mask is not None
    other = torch.where(condition.mask[..., None], condition.tokens, torch.full((), 9.0))
    changed = Condition(other, condition.mask, condition.pooled, condition.image)
    for a, b in zip(heads()(maps(), condition), heads()(maps(), changed), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_conditioning_is_optional() -> None:
    features = maps()
    nothing = heads(None, 0)(features, Condition())
    for a, b in zip(nothing, heads(None, 0)(features, told()), strict=True):
        assert torch.equal(a, b)


def test_rolled_conditions_keep_the_picture() -> None:
    condition = told()
    rolled = condition.rolled()
    assert condition.tokens is not None
    assert rolled.tokens is not None
    assert torch.equal(rolled.tokens[0], condition.tokens[1])
    assert rolled.image is condition.image


def test_heads_learn_to_tell_and_the_penalty_reaches_them() -> None:
    network = heads().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    real, fake = maps(3, 8), maps(4, 8)
    condition = Condition(
        torch.randn(16, 6, 12), torch.ones(16, 6).bool(), None, torch.randn(16, 8)
    )
    losses = []
    for _ in range(40):
        leaves = [x.requires_grad_() for x in real]
        joined = [torch.cat(pair) for pair in zip(leaves, fake, strict=True)]
        verdicts = [x.split(8) for x in network(joined, condition)]
        good, bad = [v[0] for v in verdicts], [v[1] for v in verdicts]
        loss = hinge_discriminator(good, bad) + 1e-5 * r1_penalty(good, leaves)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_no_gradient_reaches_the_feature_network() -> None:
    features = PictureFeatures((16, 16, 32, 32), 64, (5, 7, 3), 10).eval().requires_grad_(False)
    network = Discriminator(
        features.channels, features.sides, width=32, text=None, text_dim=0, image_dim=0
    )
    network.eval().requires_grad_(False)
    fake = torch.randn(2, 3, 64, 64, requires_grad=True)
    found, _ = features(fake)
    hinge_generator(network(found, Condition())).backward()
    assert fake.grad is not None
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in (*features.parameters(), *network.parameters()))


def test_feature_maps_are_standardised() -> None:
    torch.manual_seed(0)
    network = PictureFeatures((16, 16, 32, 32), 64, (5, 7, 3), 10).eval()
    pictures = torch.randn(32, 3, 64, 64)
    network.standardise(pictures)
    found, embedding = network(pictures)
    assert [x.shape[-1] for x in found] == [32, 16, 8, 4] == list(network.sides)
    assert embedding.shape == (32, network.embedding)
    for x in found:
        assert x.mean((0, 2, 3)).abs().max() < 1e-3
        assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_fid_network_is_another_architecture() -> None:
    fid = FidFeatures((8, 16, 16), 10)
    assert fid.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 64)
    kinds = {type(module).__name__ for module in fid.modules()}
    others = {type(module).__name__ for module in PictureFeatures((16,), 64, (5,), 1).modules()}
    assert "BatchNorm2d" in kinds - others
    assert "GroupNorm" in others - kinds


@pytest.mark.parametrize(
    ("kind", "patch", "side"), [("Dinov2", 14, 5), ("ViT", 16, 4), ("CLIPVision", 16, 4)]
)
def test_features_from_a_local_folder(tmp_path: Path, kind: str, patch: int, side: int) -> None:
    """Of another size than the network's own: the positions are interpolated."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        image_size=7 * patch, patch_size=patch,
    )  # fmt: skip
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "network")
    network = TransformerFeatures(tmp_path / "network", 64).eval()
    pictures = torch.rand(2, 3, 64, 64, requires_grad=True)
    found, embedding = network(pictures)
    assert [tuple(x.shape) for x in found] == [(2, 32, side, side)] * 4
    assert embedding.shape == (2, 32)
    # A plain sum of a normalised map is constant.
    found[0].square().mul(torch.rand(32, 1, 1)).sum().backward()
    assert pictures.grad is not None
    assert float(pictures.grad.abs().max()) > 0


def test_a_folder_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="not the folder of a feature network") as caught:
        TransformerFeatures(tmp_path, 64)
    assert caught.value.why == "it has no config.json"
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PreconditionError, match="not the folder of a feature network") as caught:
        TransformerFeatures(tmp_path, 64)
    assert "'bert'" in caught.value.why

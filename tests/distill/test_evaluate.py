"""FID's arithmetic, the evaluation of a folder, the comparison of student and teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import PreconditionError
from core.files import ROOT
from distill.evaluate import fid_shapes, held_out, main
from distill.fidelity import frechet_distance, standard_scores
from distill.quality import weaknesses, wording_table
from distill.report import WANTED, compare, typing_shares
from distill.shapes import draw

SHAPES_TURBO = ROOT / "models" / "shapes-turbo"


def test_frechet_distance_of_known_gaussians() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1, (60_000, 3))
    second = rng.normal((1, 0, 2), (2, 1, 1), (60_000, 3))
    # |mu|^2 = 5; per axis (s1 - s2)^2: 1.
    assert frechet_distance(first, second) == pytest.approx(6, rel=0.03)
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_held_out_captions_are_fixed_and_held_out() -> None:
    items = held_out(30)
    assert items == held_out(30)
    assert all(scene.held_out for scene in items)
    assert [len(scene.objects) for scene in items] == [1] * 10 + [2] * 10 + [3] * 10


def test_fid_grows_with_damage(smoke: Path) -> None:
    network = smoke / "distill" / "smoke" / "smoke-turbo" / "fid"
    items = held_out(300)
    clean = draw(items, seed=1)
    noise = np.random.default_rng(0).normal(0, 60, clean.shape)
    noisy = (clean + noise).clip(0, 255).astype(np.uint8)
    (good, _), (bad, error) = (fid_shapes(made, items, network, 64) for made in (clean, noisy))
    assert good < 0.2 * bad
    assert 0 < error < bad


def test_the_command(smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = smoke / "distill" / "smoke" / "smoke-turbo"
    out, picture = tmp_path / "figures.json", tmp_path / "sheet.png"
    arguments = ["--steps", "1,2", "--captions", "6", "--out", str(out), "--picture", str(picture)]
    assert main([str(folder), *arguments]) == 0
    rows = json.loads(out.read_text())
    assert [row["steps"] for row in rows] == [1, 2]
    assert rows[0]["captions"] == rows[0]["fid_samples"] == 6
    assert set(rows[0]) >= {"all", "shape", "colour", "size", "position", "background", "count"}
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == rows[0]
    assert picture.stat().st_size > 100


def test_other_wordings_and_the_tiny_decoder(
    smoke: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(smoke / "distill" / "smoke" / "smoke-turbo")
    wordings = "full,grounds,loose,cut,typed"
    arguments = ["--steps", "1", "--captions", "10", "--decoder", "taesd", "--wording", wordings]
    assert main([folder, *arguments]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    full, *others = (json.loads(line) for line in lines)
    assert [row["wording"] for row in others] == wordings.split(",")[1:]
    assert {row["decoder"] for row in (full, *others)} == {"taesd"}
    assert "fid_shapes" in full
    typed = others.pop()
    assert typed["captions"] == 1
    assert typed["pictures"] > 40
    assert set(typed) >= {"steady", "valid"}
    assert all(set(row) >= {"all", "stated", "valid"} for row in others)
    assert all(row["captions"] == 10 for row in others)


def test_a_tiny_decoder_draws_other_pictures(smoke: Path) -> None:
    from distill.evaluate import draw_texts

    folder = smoke / "distill" / "smoke" / "smoke-turbo"
    ways = [
        draw_texts(folder, ["a red star"], [0], steps=1, decoder=name) for name in ("vae", "taesd")
    ]
    (whole, first), (tiny, second) = ways
    assert (whole["decoder"], tiny["decoder"]) == ("vae", "taesd")
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--wording", "dinner"], "'dinner' is none of full"),
        (["--wording", "loose", "--clip", "."], "compare the pictures of full captions"),
    ],
)
def test_wordings_that_cannot_be_judged_are_refused(
    arguments: list[str], what: str, tmp_path: Path
) -> None:
    with pytest.raises(PreconditionError, match=what):
        main([str(tmp_path), *arguments])


def test_other_folders_and_schedulers_are_refused(smoke: Path, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="no checkpoint folder"):
        main([str(tmp_path / "none")])
    with pytest.raises(PreconditionError, match="lacks"):
        main([str(tmp_path)])
    with pytest.raises(PreconditionError, match="no scheduler"):
        main(
            [
                str(smoke / "distill" / "smoke" / "smoke-turbo"),
                "--scheduler",
                "Best",
                "--captions",
                "3",
            ]
        )


def test_standard_scores_want_their_weights(tmp_path: Path) -> None:
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(PreconditionError, match="no weights at"):
        standard_scores(pictures, pictures, ["a"] * 2, inception=tmp_path / "none", clip=None)


@pytest.fixture
def metrics() -> None:
    """torchmetrics with what its FID stands on, where they can be imported."""
    try:
        import torchmetrics.image.fid  # noqa: F401
        from torch_fidelity import feature_extractor_inceptionv3  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision of another torch build
        pytest.skip(f"needs pip install -e '.[scores]': {error}")


@pytest.mark.slow
@pytest.mark.usefixtures("metrics")
def test_the_standard_fid_of_local_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an Inception with random weights: nothing between equal sets, more with more damage."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = tmp_path / "inception.pth"
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3(
            "random", ["2048"], feature_extractor_weights_path=str(weights)
        )
    torch.save(network.state_dict(), weights)
    items = held_out(4)
    real = draw(items, seed=1)
    captions = [scene.caption for scene in items]

    def fid(made: np.ndarray) -> float:
        return standard_scores(made, real, captions, inception=weights, clip=None)["fid"]

    noise = np.random.default_rng(0).integers(0, 60, real.shape)
    little, much = (np.clip(real + noise * k, 0, 255).astype(np.uint8) for k in (1, 3))
    assert fid(real) == pytest.approx(0, abs=1e-3)
    assert 0 < fid(little) < fid(much)


def test_the_clip_score_of_a_local_folder(tmp_path: Path) -> None:
    """Over a CLIP with random weights: the cosine that its own two halves have."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES_TURBO / "tokenizer")
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2,
            "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    clip.save_pretrained(tmp_path)
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(tmp_path)
    items = held_out(40)
    made, captions = draw(items, seed=1), [scene.caption for scene in items]
    with torch.no_grad():
        seen = clip.get_image_features(**pictures(list(made), return_tensors="pt"))
        read = clip.get_text_features(**tokenizer(captions, return_tensors="pt", padding=True))
    cosine = torch.cosine_similarity(seen.pooler_output, read.pooler_output)
    wanted = max(0.0, 100 * float(cosine.mean()))
    found = standard_scores(made, made, captions, inception=None, clip=tmp_path)["clip_score"]
    assert found == pytest.approx(wanted, abs=1e-3)
    assert abs(float(cosine.mean())) > 1e-3, "the test would pass for any sign"
    backwards = standard_scores(made, made, captions[::-1], inception=None, clip=tmp_path)
    assert backwards["clip_score"] != found or wanted == 0


def row(steps: int, share: float) -> dict[str, float]:
    return {"steps": steps, "all": share, "all_1": share}


def test_ratios_of_student_and_teacher() -> None:
    student = [row(1, 0.8), row(2, 0.85), row(4, 0.9)]
    found = compare(student, [row(50, 0.9), row(1, 0.3), row(1, 0.4)], 50)["ratios"]
    assert found["one_step"] == pytest.approx(0.8889, abs=1e-4)
    assert found["four_steps"] == 1.0
    assert found["gap_closed"] == pytest.approx(0.8)  # from the better of the teacher's one-steps
    assert found["teacher_single"] == 0.9
    assert compare(student, [row(50, 0.0), row(1, 0.0)], 50)["ratios"]["one_step"] is None


def test_what_is_wanted_while_one_types_is_of_one_step() -> None:
    def judged(wording: str, steps: int, share: float, **more: float) -> dict[str, Any]:
        return {"wording": wording, "decoder": "vae", "steps": steps, "all": share, **more}

    found = {
        "student": [row(1, 0.98), row(4, 0.99)],
        "wordings": [
            judged("grounds", 1, 0.97),
            judged("loose", 4, 0.99),
            judged("loose", 1, 0.96),
            judged("cut", 1, 0.9, stated=0.94, valid=0.98),
            {"wording": "typed", "decoder": "vae", "steps": 1, "steady": 0.91, "valid": 0.99},
        ],
        "tiny": [{**row(1, 0.95), "decoder": "taesd"}],
        "tiny_encoder": {"vae": 0.97, "taesd": 0.96},
    }
    assert typing_shares(found) == {
        "full": 0.98, "grounds": 0.97, "loose": 0.96, "cut_stated": 0.94, "cut_valid": 0.98,
        "steady": 0.91, "tiny_decoder": 0.95, "tiny_encoder": 0.97,
    }  # fmt: skip
    table = wording_table(found)
    assert "| cut | vae | 1 | 0.900 | 0.940 | 0.980 |  |" in table
    assert "| typed | vae | 1 |  |  | 0.990 | 0.910 |" in table
    assert "| full | taesd | 1 | 0.950 |  |  |  |" in table
    assert set(typing_shares(found)) < set(WANTED)


def test_a_card_says_what_speaks_against_the_model() -> None:
    def judged(steps: int, two: float, fid: float, guidance: float = 0.0) -> dict[str, float]:
        return {"steps": steps, "guidance": guidance, "all_1": 1.0, "all_2": two, "all_3": 0.9,
                "fid_shapes": fid}  # fmt: skip

    student = [judged(1, 0.5, 4.0), judged(4, 0.6, 3.0)]
    teacher = [judged(50, 0.9, 2.0, 3.0), judged(1, 0.0, 30.0), judged(4, 0.5, 2.5)]
    hardest, gap, fid = weaknesses({"student": student, "teacher": teacher})
    assert hardest == "Pictures of two objects are hardest: 50.0% / 60.0% at 1 / 4 steps."
    assert "100.0% of one object, 0.0% of two objects, 90.0% of three objects" in gap
    assert "4 steps (2.5 against 3.0)" in fid
    assert "1 steps" not in fid

"""Random weights and the tokenizer that comes with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.files import ROOT, sha256_file
from export.models import MODELS, PARTS, PICTURE_PARTS
from export.parts import TextEncoder, example_inputs, wrap
from export.source.checkpoint import open_checkpoint
from export.source.tokenizer import END, START, save_tokenizer, train_tokenizer

TURBO = MODELS["sdxl-turbo"]
TINY = open_checkpoint(MODELS["tiny-sdxl"], "random")

# Millions of parameters of stabilityai/sdxl-turbo and madebyollin/taesdxl, counted on the published
# weights. Of the autoencoders: the decoder with what stands before it, the encoder with what stands
# behind it.
PUBLISHED = {
    "text_encoder": 123.06,
    "text_encoder_2": 694.66,
    "unet": 2567.46,
    "vae_decoder": 49.49,
    "taesd_decoder": 1.22,
    "vae_encoder": 34.16,
    "taesd_encoder": 1.22,
}


@pytest.mark.parametrize("part", PARTS)
def test_the_architecture_has_the_published_number_of_parameters(part: str) -> None:
    module = open_checkpoint(TURBO, "random").skeleton(part)
    halved = part.endswith("decoder") or part in PICTURE_PARTS
    counted = wrap(part, module, TURBO) if halved else module
    millions = sum(p.numel() for p in counted.parameters()) / 1e6
    assert round(millions, 2) == PUBLISHED[part]
    assert all(p.is_meta for p in module.parameters())


def test_the_lean_text_encoders_of_sdxl_turbo_run_11_of_12_and_32_of_32_layers() -> None:
    checkpoint = open_checkpoint(TURBO, "random")
    first = wrap("text_encoder", checkpoint.skeleton("text_encoder"), TURBO)
    second = wrap("text_encoder_2", checkpoint.skeleton("text_encoder_2"), TURBO)
    assert isinstance(first, TextEncoder)
    assert isinstance(second, TextEncoder)
    assert (len(first.layers), first.taken) == (11, 11)
    assert (len(second.layers), second.taken) == (32, 31)


@pytest.mark.parametrize("part", TINY.model.parts)
def test_values_do_not_depend_on_the_dtype(part: str) -> None:
    half = TINY.module(part, torch.float16).state_dict()
    full = TINY.module(part, torch.float32).state_dict()
    assert half.keys() == full.keys()
    assert all(torch.equal(half[name].float(), full[name]) for name in full)


def test_values_depend_on_the_seed_and_on_nothing_else() -> None:
    first = TINY.module("unet", torch.float32).state_dict()
    TINY.module("vae_decoder", torch.float32)  # another module drawn in between
    again = TINY.module("unet", torch.float32).state_dict()
    other = open_checkpoint(TINY.model, "random", seed=1).module("unet", torch.float32).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("part", TINY.model.parts)
def test_activations_stay_of_order_one(part: str) -> None:
    module = TINY.module(part, torch.float32)
    inputs = example_inputs(part, module, 2, 64, 64, torch.float32)
    largest: list[float] = []

    def record(_: object, __: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            largest.append(float(output.abs().max()))

    for child in module.modules():
        child.register_forward_hook(record)
    with torch.no_grad():
        outputs = wrap(part, module, TINY.model)(*inputs.values())
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert 0.1 < float(output.std()) < 3
    assert max(largest) < 100  # FP16 ends at 65504


def test_the_tiny_model_has_a_few_hundred_thousand_parameters() -> None:
    modules = (TINY.skeleton(part) for part in TINY.model.parts)
    total = sum(p.numel() for module in modules for p in module.parameters())
    assert 100_000 < total < 1_000_000


def test_the_tokenizer_is_trained_the_same_in_every_process(tmp_path: Path) -> None:
    config = {"pad_token": END, "model_max_length": 77}
    script = (
        "import sys, pathlib; from export.source.tokenizer import save_tokenizer;"
        f"save_tokenizer({config!r}, pathlib.Path(sys.argv[1]))"
    )
    save_tokenizer(config, tmp_path / "here")
    command = [sys.executable, "-c", script, str(tmp_path / "there")]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "7", "PATH": ""})
    names = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert {file.name for file in (tmp_path / "here").iterdir()} == names
    for name in names:
        assert sha256_file(tmp_path / "here" / name) == sha256_file(tmp_path / "there" / name)


def test_end_of_text_has_the_highest_id_and_fits_the_embeddings() -> None:
    vocabulary, merges = train_tokenizer()
    assert vocabulary[END] == max(vocabulary.values()) == len(vocabulary) - 1
    assert vocabulary[START] == vocabulary[END] - 1
    assert len(merges) > 100
    for part in ("text_encoder", "text_encoder_2"):
        assert len(vocabulary) <= TINY.config(part)["vocab_size"]


TOKENIZERS = TINY.tokenizers()


@given(st.text(max_size=400))
def test_any_text_becomes_77_tokens_that_end_in_end_of_text(text: str) -> None:
    for tokenizer, padding in zip(TOKENIZERS, (END, "!"), strict=True):
        ids = tokenizer(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
        end = tokenizer.convert_tokens_to_ids(END)
        first_end = ids.index(end)
        assert len(ids) == 77
        assert ids[0] == end - 1
        assert set(ids[first_end + 1 :]) <= {tokenizer.convert_tokens_to_ids(padding)}


def test_the_tokenizer_gives_back_what_it_was_trained_on() -> None:
    ids = TOKENIZERS[0]("A photo of a Red circle, on fire")["input_ids"]
    text = TOKENIZERS[0].decode(ids, skip_special_tokens=True)
    assert text.replace(" ,", ",") == "a photo of a red circle, on fire"


def test_the_vocabulary_serves_older_readers_too(tmp_path: Path) -> None:
    """vocab.json and merges.txt alone give the same ids as tokenizer.json."""
    from transformers import CLIPTokenizer

    save_tokenizer({"pad_token": END, "model_max_length": 77}, tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").unlink()
    old = CLIPTokenizer.from_pretrained(tmp_path / "t")
    text = "an origami pig on fire, 4k"
    assert old(text)["input_ids"] == TOKENIZERS[0](text)["input_ids"]

"""A CLIP tokenizer of our own, for random weights: byte-level BPE trained on captions made here.

It has CLIP's normaliser, pre-tokeniser and special tokens, and a smaller vocabulary. The
end-of-text token has the highest id: transformers pools there when a config says `eos_token_id` 2.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

VOCABULARY = 1000
"""Tokens at most. Every embedding table that uses this tokenizer has at least as many rows."""

START, END = "<|startoftext|>", "<|endoftext|>"

_STYLES = "a photo of|an oil painting of|a pencil sketch of|a watercolour of|a render of|an icon of"
_ADJECTIVES = "small red|large blue|shiny green|old wooden|bright yellow|dark purple|soft white"
_SUBJECTS = (
    "circle|square|triangle|lighthouse|origami pig|cat|dog|castle|mountain|forest|astronaut|robot"
    "|bicycle|teapot|sailing boat|violin|portrait of a woman|bowl of fruit|street market|dragon"
)
_PLACES = (
    "on a white background|at dusk|on fire|in the rain|under the stars, highly detailed"
    "|in a city, cinematic lighting|by the sea|with mountains behind it, 4k|in autumn|on the moon"
)


def captions() -> list[str]:
    """Every combination of the word lists, in a fixed order."""
    lists = (text.split("|") for text in (_STYLES, _ADJECTIVES, _SUBJECTS, _PLACES))
    return [" ".join(words) for words in itertools.product(*lists)]


def train_tokenizer() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train on `captions()`. Returns the vocabulary and the merges in CLIP's order."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    # An empty CLIPTokenizer gives the exact normaliser and pre-tokeniser.
    clip = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    tokenizer = Tokenizer.from_str(clip.to_str())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Given as special tokens so that their ids are fixed: the trainer breaks ties by id, and would
    # else number the letters that end a word in the order of a hash table.
    alphabet = [*letters, *(letter + "</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions(), trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    merges = [(first, second) for first, second in model["merges"]]
    # As in CLIP: letters, letters at the end of a word, merges in order, the two special tokens.
    tokens = [*alphabet, *dict.fromkeys("".join(pair) for pair in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def save_tokenizer(config: dict[str, Any], folder: Path) -> None:
    """Train and write `tokenizer.json`, `tokenizer_config.json`, `vocab.json` and `merges.txt`.

    The last two are what releases of transformers before 5 read.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = train_tokenizer()
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=config["pad_token"],
        model_max_length=config["model_max_length"],
    )
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")

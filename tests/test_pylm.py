"""The bundled model is a language model, small, and loads through transformers alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import saebench
from saebench.text import stdlib_documents

FOLDER = Path(saebench.__file__).parent / "pylm"
HELD_OUT = ("xml.etree.ElementTree", "re._parser", "multiprocessing.connection", "queue")
"""Modules whose name hashes into the share that was never trained on."""


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def texts():
    found = [d.text for d in stdlib_documents() if d.name in HELD_OUT]
    if not found:
        pytest.skip("this Python's standard library has none of the held-out modules")
    return found


@torch.no_grad()
def mean_loss(model, stream):
    rows = torch.tensor(stream[: len(stream) // 255 * 255]).reshape(-1, 255)[:60]
    rows = torch.cat([torch.zeros(len(rows), 1, dtype=rows.dtype), rows], dim=1)
    logits = model(rows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def test_the_package_carries_at_most_12_megabytes_of_model():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12_000_000
    assert {path.suffix for path in FOLDER.iterdir()} <= {".json", ".safetensors", ".md"}


def test_the_tokenizer_gives_every_text_back(tokenizer):
    text = "def f(x):\n\treturn x ** 2  # Übung 漢字 🎉\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(tokenizer) == 4096


def test_unseen_modules_are_predicted_far_better_than_by_word_frequencies(model, tokenizer, texts):
    stream = [i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids]
    counts = np.bincount(stream, minlength=4096)
    share = counts[counts > 0] / counts.sum()
    entropy = -(
        share * np.log(share)
    ).sum()  # the best that any unigram model could do on this text
    assert mean_loss(model, stream) < 0.6 * entropy


def test_the_order_of_the_context_matters(model, tokenizer, texts):
    stream = tokenizer(texts[0], add_special_tokens=False).input_ids
    shuffled = np.random.default_rng(0).permutation(stream).tolist()
    assert mean_loss(model, stream) < mean_loss(model, shuffled) - 2


def test_the_card_states_what_the_record_holds():
    record = json.loads((FOLDER / "card.json").read_text())
    card = (FOLDER / "README.md").read_text()
    for key in ("held_out_nats_per_token", "held_out_bits_per_byte"):
        assert f"{record[key]:.3f}" in card
    assert record["held_out_nats_per_token"] <= 2.25 or record["held_out_bits_per_byte"] <= 0.97

"""The encoder in the repository is what its card says."""

import re

import pytest
import torch
from safetensors.torch import load_file

import data
from engine import encoders
from tools import pretrain
from conftest import ROOT

MINI = ROOT / "mini"
SENTENCES = ["The capital of France is [MASK].", "She [MASK] a letter to her brother in 1942."]


def test_it_is_small_and_in_half_precision():
    path = MINI / "model.safetensors"
    assert path.stat().st_size < 20e6
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


def test_transformers_reads_the_same_masked_language_model():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(MINI, dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(MINI)(
        SENTENCES, padding=True, return_tensors="pt")
    ours = encoders.load(MINI).eval()
    ids, mask = data.Tokenizer.read(MINI)(SENTENCES, max_tokens=32)
    assert ids.tolist() == tokens["input_ids"].tolist()
    with torch.no_grad():
        expected = theirs(**tokens).logits[mask]
        found = encoders.load_masked_lm(MINI, ours)(ours.encoder(ids, mask)[-1])[mask]
    assert torch.allclose(found, expected, atol=1e-4)


def test_on_text_never_trained_on_it_guesses_as_well_as_the_card_says(real_data):
    """Every hundredth document was held out. Half precision moves the third decimal."""
    corpus = data.read_corpus("wiki_docs", real_data)
    other = corpus.part(row for row, document in enumerate(corpus.documents)
                        if document % 100 == 99)
    _, stream = pretrain.streams(other, data.Tokenizer.read(MINI))
    model = encoders.load(MINI)
    lm = pretrain.MaskedLM(model, encoders.load_masked_lm(MINI, model))
    found = pretrain.held_out(lm, pretrain.Sequences(stream, data.Tokenizer.read(MINI), 64))
    said = re.search(r"loss\s+\*\*([\d.]+)\*\*, guessed right\s+\*\*([\d.]+)%\*\*",
                     (MINI / "README.md").read_text())
    assert found["held_out_loss"] == pytest.approx(float(said[1]), abs=.003)
    assert 100 * found["held_out_accuracy"] == pytest.approx(float(said[2]), abs=.15)

"""What is skipped for speed changes no result: training beside the padded loop of transformers.

That single layers and vectors are equal, in any batch and order, is in test_model.py.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import data
from eval_sts import read_test
from engine.encoders import ENCODER, in_thirds, load, translate
from losses import info_nce
from model import encode

TEXTS = ["the dog runs home and then sleeps until the evening", "a cat", "my owl reads books",
         "an elk sees us at night", "one bee"]


@pytest.fixture
def step(tiny):
    """Loss and gradients of one step without dropout; the other view has words before it."""
    model, tokenizer = load(tiny, pooling="cls", dropout=0.).train(), data.Tokenizer.read(tiny)

    def gradients(texts, *, extra=0, bf16=False):
        ids, mask = tokenizer([*texts, *(f"it is so: {text}" for text in texts)], max_tokens=32)
        ids, mask = F.pad(ids, (0, extra)), F.pad(mask, (0, extra))
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            vectors = model(ids, mask).float()
        loss = info_nce(*vectors.chunk(2))
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.encoder.named_parameters()}
    return gradients


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_step_without_padding_is_the_padded_step_of_transformers(step, tiny):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModel.from_pretrained(tiny, dtype=torch.float32,
                                                       add_pooling_layer=False).eval()
    ids, mask = data.Tokenizer.read(tiny)([*TEXTS, *(f"it is so: {text}" for text in TEXTS)],
                                          max_tokens=32)
    hidden = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    anchor, positive = hidden[:, 0].chunk(2)
    similarity = F.cosine_similarity(anchor[:, None], positive, dim=-1) / 0.05        # (B, B)
    expected = F.cross_entropy(similarity, torch.arange(len(TEXTS)))
    expected.backward()
    loss, gradients = step(TEXTS)
    close(loss, expected.detach())
    named = dict(reference.named_parameters())
    for name, gradient in translate(in_thirds(gradients), ENCODER).items():
        close(gradient, named[name].grad)


@pytest.mark.parametrize("texts, extra", [(TEXTS, 7), (TEXTS[::-1], 0)],
                         ids=["more padding", "another order"])
def test_neither_padding_nor_the_order_within_a_batch_changes_a_gradient(step, texts, extra):
    (loss, gradients), (same, others) = step(TEXTS), step(texts, extra=extra)
    close(same, loss)
    close(others, gradients)


def test_bfloat16_turns_the_weights_nearly_the_same_way(step):
    (loss, exact), (rough_loss, rough) = step(TEXTS), step(TEXTS, bf16=True)
    flat, rough_flat = (torch.cat([g.flatten() for g in found.values()])
                        for found in (exact, rough))
    assert not torch.equal(flat, rough_flat)
    assert rough_loss.item() == pytest.approx(loss.item(), rel=.02)
    assert F.cosine_similarity(flat, rough_flat, dim=0) > .95


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_score_of_a_test_does_not_depend_on_the_batch_size(batch_size, tiny, pairs):
    model, tokenizer = load(tiny), data.Tokenizer.read(tiny)
    scores = [read_test(str(pairs)).score(partial(encode, model, tokenizer, batch_size=size)).scores
              for size in (64, batch_size)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)

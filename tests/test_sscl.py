"""SSCL: lower layers as negatives, and the measures of the over-smoothing it is meant against."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import at, resolved
from data import Corpus
from engine.flags import check_ranges
from losses import info_nce
from model import Encoder, EncoderConfig, Head, SentenceEncoder
from papers import check
from papers.simcse import Encoded
from papers.sscl import SSCL, Config

CORPUS = Corpus("animals", [["a dog runs", "a cat sleeps", "an owl sees"]], None, "", 0)
SHAPE = EncoderConfig("bert", vocab_size=7, width=2, layers=3, heads=1, inner=5)
SMALL = Config(method="sscl", batch_size=2)


def encoder(*, pooling="cls", head=None):
    return SentenceEncoder(Encoder(SHAPE), pooling=pooling, head=head)


def sscl(model=None, **settings):
    """The method on an encoder that it never runs: by default 3 layers x 2, no head."""
    return SSCL(CORPUS, replace(SMALL, **settings), model=model or encoder()).double()


def encoded(hidden, model=None, mask=None):
    """What the training loop hands over, for given hidden states L + 1 x (V·B, T, D)."""
    mask = torch.ones(hidden[0].shape[:2], dtype=torch.bool) if mask is None else mask
    columns = (model or encoder()).embed([hidden[-1]], mask).chunk(2)
    return Encoded(list(columns), 1, 9, mask=mask, hidden=hidden)


def random_hidden(L=3, V=2, B=5, T=3, D=2, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(V * B, T, D, dtype=torch.double) for _ in range(L + 1)]


# Angles, each the only token of a sentence.
ANCHORS, POSITIVE, BELOW, NOT_READ = (0, 90), (10, 80), (20, 70, 25, 60), (1, 2, 3, 4)


# ---- the loss -------------------------------------------------------------------------------

def test_a_batch_of_two_on_a_sheet_of_paper():
    """Logits are 20 cos: 19.696 at 10°, 18.794 at 20°, 18.126 at 25°, 17.320 at 30°.

    The anchor at 0° has its positive at 10°, and below it 20° and 25° are near; that at 90° has
    80°, 70° and 60°. All else is below e^-9 of a positive.
    """
    at_0 = math.log(1 + math.exp(18.794 - 19.696) + math.exp(18.126 - 19.696))      # .4787
    at_90 = math.log(1 + math.exp(18.794 - 19.696) + math.exp(17.320 - 19.696))     # .4045
    layers = (NOT_READ, NOT_READ, BELOW, (*ANCHORS, *POSITIVE))
    found = sscl(layers_as_negatives=1, layer_weight=1.).loss(
        encoded([at(*layer)[:, None] for layer in layers]))
    assert found.item() == pytest.approx((at_0 + at_90) / 2, abs=1e-3)


@pytest.mark.parametrize("positive, weight, expected", [
    (POSITIVE, 0., 9.0024e-08), (POSITIVE, .5, .220773), (POSITIVE, 1., .441546),
    (ANCHORS, 1., .343450)])                                      # no dropout: both views are one
def test_the_worked_example_with_layers_for_none_half_and_all_of_the_loss(
        positive, weight, expected):
    method = sscl(layers_as_negatives=1, layer_weight=weight)
    layers = (NOT_READ, NOT_READ, BELOW, (*ANCHORS, *positive))
    found = method.loss(encoded([at(*layer)[:, None] for layer in layers]))
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_every_anchor_sees_all_sentences_in_both_views_of_every_layer_asked_for():
    """The slow version: a sum over each candidate, with the positive in column i."""
    B, M = 5, 2
    hidden = random_hidden(B=B)
    out = encoded(hidden)
    total = 0
    for i in range(B):
        def similarity(x):
            return math.exp(F.cosine_similarity(out.anchor[i], x, dim=0) / .05)
        among = sum(similarity(out.positive[j]) for j in range(B))
        below = sum(similarity(hidden[3 - layer][row, 0]) for layer in range(1, M + 1)
                    for row in range(2 * B))
        own = similarity(out.positive[i])
        total -= .5 * math.log(own / among) + .5 * math.log(own / (among + below))
    assert sscl(layers_as_negatives=M).loss(out).item() == pytest.approx(total / B)


def test_candidates_are_positives_then_both_views_of_the_deepest_layer_and_so_on():
    """Neither the last layer is among them nor the embeddings."""
    hidden = random_hidden(B=5)
    out, seen = encoded(hidden), []
    method = sscl()

    def spy(anchor, candidates, weight=None):
        seen.append(candidates)
        return info_nce(anchor, candidates)
    method.loss_of = spy
    method.loss(out)
    expected = [out.positive, hidden[2][:5, 0], hidden[2][5:, 0], hidden[1][:5, 0],
                hidden[1][5:, 0]]
    assert all(torch.equal(a, b) for a, b in zip(seen[1].split(5), expected, strict=True))
    assert method.layers_read == 3                                # the last one and two below


@pytest.mark.parametrize("settings", [dict(layers_as_negatives=0), dict(layer_weight=0.)])
def test_without_layers_or_their_weight_it_is_simcse_exactly(settings):
    out, method = encoded(random_hidden()), sscl(**settings)
    assert method.loss(out) == info_nce(out.anchor, out.positive) and method.logs() == {}


def test_more_negatives_never_make_it_easier():
    for seed in range(20):
        out = encoded(random_hidden(seed=seed))
        plain, half, all_of_it = (sscl(layer_weight=w).loss(out) for w in (0., .5, 1.))
        assert plain <= half <= all_of_it


def test_where_the_last_layer_does_nothing_the_loss_is_at_least_log_3():
    """The positive itself is among the negatives then, in both views."""
    hidden = random_hidden(B=5)
    hidden[2] = hidden[3] = torch.cat([hidden[3][:5]] * 2)        # no dropout: both views are one
    out = encoded(hidden)
    method = sscl(layers_as_negatives=1, layer_weight=1.)
    assert method.loss(out) >= math.log(3) > info_nce(out.anchor, out.positive)
    assert method.logs()["layer_cosine"] == pytest.approx(1)


def test_the_lower_layers_get_a_gradient_of_their_own():
    hidden = [x.requires_grad_() for x in random_hidden()]
    sscl().loss(encoded(hidden)).backward()
    assert hidden[2].grad.any() and hidden[1].grad.any() and hidden[0].grad is None


def test_the_training_head_serves_all_layers_and_is_counted_once():
    head = Head(2).double()
    model = encoder(head=head).train()
    method = sscl(model)
    assert not list(method.parameters()) and not list(method.buffers())
    hidden, seen = random_hidden(), []
    out = encoded(hidden, model)
    head.register_forward_hook(lambda *call: seen.append(call[1][0]))
    method.loss(out)
    assert torch.equal(seen[0], hidden[2][:, 0]) and torch.equal(seen[1], hidden[1][:, 0])


def test_with_mean_pooling_padding_changes_nothing():
    model = encoder(pooling="mean")
    hidden = random_hidden(T=3)
    longer = [torch.cat([x, torch.zeros(10, 2, 2).double()], dim=1) for x in hidden]
    mask = torch.arange(5).expand(10, 5) < 3
    short, padded = encoded(hidden, model), encoded(longer, model, mask)
    assert sscl(model).loss(short).item() == pytest.approx(sscl(model).loss(padded).item())


def test_layers_in_bfloat16_are_compared_in_float32():
    hidden, model = [x.bfloat16() for x in random_hidden()], encoder(pooling="mean")
    exact = encoded([x.float() for x in hidden], model)
    half = replace(exact, hidden=hidden)
    assert torch.equal(sscl(model).loss(half), sscl(model).loss(exact))


# ---- settings -------------------------------------------------------------------------------

@pytest.mark.parametrize("model_type, width, rate", [
    ("bert", 768, 3e-5), ("bert", 1024, 1e-5), ("roberta", 768, 1e-5), ("roberta", 1024, 1e-5)])
def test_defaults_are_those_of_the_paper_and_its_code(model_type, width, rate):
    config = resolved("sscl", model_type, width)
    assert (config.layers_as_negatives, config.layer_weight) == (2, .5)
    assert (config.learning_rate, config.batch_size, config.epochs) == (rate, 64, 1)


def test_as_many_layers_as_lie_below_the_last_are_taken_and_more_refused(program, capsys):
    SSCL.check(SMALL, [CORPUS], SHAPE)
    with pytest.raises(ValueError, match="--layers-as-negatives: expected at most 2, those be"):
        SSCL.check(replace(SMALL, layers_as_negatives=3), [CORPUS], SHAPE)
    with pytest.raises(SystemExit) as refused:                    # of a real encoder, two layers
        program(method="sscl", layers_as_negatives=2)
    assert refused.value.code == 2 and "expected at most 1" in capsys.readouterr().err


def test_hard_negatives_and_values_out_of_range_are_refused_and_pairs_are_not():
    check(SMALL, [replace(CORPUS, columns=CORPUS.columns * 2)], SHAPE)
    with pytest.raises(ValueError, match="--method sscl takes a corpus of 1 or 2 columns, found 3"):
        check(SMALL, [replace(CORPUS, columns=CORPUS.columns * 3)], SHAPE)
    for name, value, said in (("layer_weight", 1.1, "0 or more and at most 1"),
                              ("layers_as_negatives", -1, "0 or more")):
        with pytest.raises(ValueError, match=f"expected {said}, found {value}"):
            check_ranges(Config(**{name: value}))


def test_a_run_logs_both_losses_and_saves_a_plain_encoder(program, tiny):
    folder = program(method="sscl", layers_as_negatives=1, steps=2, precision="fp32")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["layer_loss"] > last["instance_loss"] > 0 and -1 <= last["layer_cosine"] <= 1
    assert load_file(folder / "model.safetensors").keys() == load_file(
        tiny / "model.safetensors").keys()

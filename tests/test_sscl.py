"""SSCL: lower layers as negatives, and the measures of the over-smoothing it is meant against."""

import json
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import eval_sts
from config import Config, resolve, validate
from eval_sts import layer_table, oversmoothing
from folders import load
from losses import LOSSES, info_nce, token_similarity
from methods import SSCL, Encoded
from papers import check
from model import Encoder, EncoderConfig, Head, SentenceEncoder
from positives import POSITIVES


class Texts:
    columns = [["a dog runs", "a cat sleeps", "an owl sees", "an elk walks"]]


def encoder(D=2, L=3, *, pooling="cls", head=None):
    settings = EncoderConfig("bert", vocab_size=7, width=D, layers=L, heads=1, inner=5)
    return SentenceEncoder(Encoder(settings), pooling=pooling, head=head)


def sscl(model=None, **settings):
    """The method on an encoder that it never runs: by default 3 layers x 2, no head."""
    config = replace(Config(method="sscl", batch_size=2), **settings)
    return SSCL(Texts, config, model=model or encoder()).double()


def encoded(hidden, model=None, mask=None):
    """What the training loop hands over, for given hidden states L + 1 x (V·B, T, D)."""
    mask = torch.ones(hidden[0].shape[:2], dtype=torch.bool) if mask is None else mask
    columns = (model or encoder()).embed([hidden[-1]], mask).chunk(2)
    return Encoded(list(columns), 1, 9, mask=mask, hidden=hidden)


def random_hidden(L=3, V=2, B=5, T=3, D=2, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(V * B, T, D, dtype=torch.double) for _ in range(L + 1)]


def at(*degrees):
    """Unit vectors at these angles, each the only token of a sentence: (B, 1, 2)."""
    turns = torch.tensor(degrees, dtype=torch.double).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], dim=1)[:, None]


ANCHORS, POSITIVE, BELOW = (0, 90), (10, 80), ((20, 70), (25, 60))
NOT_READ = at(1, 2, 3, 4)


def worked(**settings):
    hidden = [NOT_READ, NOT_READ, at(*BELOW[0], *BELOW[1]), at(*ANCHORS, *POSITIVE)]
    return sscl(layers_as_negatives=1, **settings), encoded(hidden)


# ---- the loss -------------------------------------------------------------------------------

@pytest.mark.parametrize("weight, expected", [(0., 9.0024e-08), (.5, .220773), (1., .441546)])
def test_the_worked_example_with_layers_for_none_half_and_all_of_the_loss(weight, expected):
    method, out = worked(layer_weight=weight)
    assert method.loss(out).item() == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_the_worked_example_where_the_positive_is_the_sentence_itself():
    """SSCL on plain BERT, paper 4.3: without dropout both views are one."""
    hidden = [NOT_READ, NOT_READ, at(*BELOW[0], *BELOW[1]), at(*ANCHORS, *ANCHORS)]
    out = encoded(hidden)
    method = sscl(layers_as_negatives=1, layer_weight=1.)
    assert method.loss(out).item() == pytest.approx(.343450, abs=1e-6)
    a = out.anchor.requires_grad_()
    own = torch.autograd.grad((F.normalize(a, dim=1) ** 2).sum() / .05, a)[0]
    assert own.abs().max() < 1e-12                                # only negatives move anything


def test_every_anchor_sees_all_sentences_in_both_views_of_every_layer_asked_for():
    """The slow version: a sum over each candidate, with the positive in column i."""
    B, M = 5, 2
    hidden = random_hidden(B=B)
    out = encoded(hidden)
    total = 0
    for i in range(B):
        def likeness(x):
            return math.exp(F.cosine_similarity(out.anchor[i], x, dim=0) / .05)
        among = sum(likeness(out.positive[j]) for j in range(B))
        below = sum(likeness(hidden[3 - layer][row, 0]) for layer in range(1, M + 1)
                    for row in range(2 * B))
        own = likeness(out.positive[i])
        total -= .5 * math.log(own / among) + .5 * math.log(own / (among + below))
    assert sscl(layers_as_negatives=M).loss(out).item() == pytest.approx(total / B)


def test_candidates_are_positives_then_both_views_of_the_deepest_layer_and_so_on():
    hidden = random_hidden(B=5)
    out, seen = encoded(hidden), []
    method = sscl()

    def spy(anchor, candidates, weight=None):
        seen.append(candidates)
        return info_nce(anchor, candidates)
    method.loss_of = spy
    method.loss(out)
    assert seen[1].shape == (5 + 2 * 2 * 5, 2)
    expected = [out.positive, hidden[2][:5, 0], hidden[2][5:, 0], hidden[1][:5, 0],
                hidden[1][5:, 0]]
    assert all(torch.equal(a, b) for a, b in zip(seen[1].split(5), expected, strict=True))


@pytest.mark.parametrize("settings", [dict(layers_as_negatives=0), dict(layer_weight=0.)])
def test_without_layers_or_their_weight_it_is_simcse_exactly(settings):
    out = encoded(random_hidden())
    assert sscl(**settings).loss(out) == info_nce(out.anchor, out.positive)
    assert sscl(**settings).logs() == {}


def test_more_negatives_never_make_it_easier():
    for seed in range(20):
        out = encoded(random_hidden(seed=seed))
        plain, half, all_of_it = (sscl(layer_weight=w).loss(out) for w in (0., .5, 1.))
        assert plain <= half <= all_of_it


def test_negatives_start_below_the_last_layer_and_never_reach_the_embeddings():
    """Layer k is the constant k: which constants come back, says which layers were read."""
    hidden = [torch.full((4, 1, 2), float(k), dtype=torch.double) for k in range(4)]
    for M, layers in [(1, {2}), (2, {2, 1})]:
        method, seen = sscl(layers_as_negatives=M), []
        method.loss_of = lambda a, c, weight=None: seen.append(c) or c.sum()
        method.loss(encoded(hidden))
        assert set(seen[1][2:].flatten().tolist()) == layers


def test_where_the_last_layer_does_nothing_the_loss_is_at_least_log_3():
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
    head.register_forward_hook(lambda module, args, result: seen.append(args[0]))
    method.loss(out)
    assert torch.equal(seen[0], hidden[2][:, 0]) and torch.equal(seen[1], hidden[1][:, 0])


def test_with_mean_pooling_padding_changes_nothing():
    model = encoder(pooling="mean")
    hidden = random_hidden(T=3)
    longer = [torch.cat([x, torch.zeros(10, 2, 2).double()], dim=1) for x in hidden]
    mask = torch.arange(5).expand(10, 5) < 3
    short, padded = encoded(hidden, model), encoded(longer, model, mask)
    assert sscl(model).loss(short).item() == pytest.approx(sscl(model).loss(padded).item())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("positives", POSITIVES)
def test_it_combines_with_every_loss_and_text_view(loss, positives):
    method = sscl(loss=loss, positives=positives)
    check(method.config, columns=1, layers=3)
    assert len(method.views([0, 1], random.Random(0))) == 2
    hidden = [x.requires_grad_() for x in random_hidden()]
    method.loss(encoded(hidden)).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in hidden[1:])


# ---- settings -------------------------------------------------------------------------------

def test_defaults_are_those_of_the_paper_and_its_code():
    config = resolve({"method": "sscl"}, model_type="bert", width=768, columns=1)
    assert (config.layers_as_negatives, config.layer_weight) == (2, .5)
    assert (config.learning_rate, config.batch_size, config.epochs) == (3e-5, 64, 1)
    for model_type, width in [("bert", 1024), ("roberta", 768), ("roberta", 1024)]:
        config = resolve({"method": "sscl"}, model_type=model_type, width=width, columns=1)
        assert (config.learning_rate, config.batch_size) == (1e-5, 64)


@pytest.mark.parametrize("settings, said", [
    (dict(layers_as_negatives=3), "--layers-as-negatives: expected at most 2, since mini has 3 la"),
])
def test_more_layers_than_lie_below_the_last_are_refused(settings, said):
    with pytest.raises(ValueError) as refused:
        check(Config(method="sscl", **settings), columns=1, layers=3)
    assert said in str(refused.value)
    check(Config(method="sscl", layers_as_negatives=2), columns=1, layers=3)


def test_hard_negatives_are_refused_and_pairs_are_not():
    check(Config(method="sscl"), columns=2, layers=3)
    with pytest.raises(ValueError, match="--method sscl takes a corpus of 1 or 2 columns, found 3"):
        check(Config(method="sscl"), columns=3, layers=3)


@pytest.mark.parametrize("settings, said", [
    (dict(layer_weight=1.1), "--layer-weight: expected from 0 to 1, found 1.1"),
    (dict(layers_as_negatives=-1), "--layers-as-negatives: expected 0 or more, found -1"),
])
def test_values_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError) as refused:
        validate(Config(**settings))
    assert said in str(refused.value)


# ---- a run ----------------------------------------------------------------------------------

@pytest.fixture
def train(program):
    return partial(program, method="sscl", layers_as_negatives=1)


@pytest.mark.parametrize("settings", [{}, {"pooling": "mean"}, {"loss": "focal"},
                                      {"precision": "bf16"}], ids=str)
def test_a_run_logs_both_losses_and_saves_a_plain_encoder(train, tiny, settings):
    folder = train(**settings)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["layer_loss"] > last["instance_loss"] > 0 and -1 <= last["layer_cosine"] <= 1
    assert load_file(folder / "model.safetensors").keys() == load_file(
        tiny / "model.safetensors").keys()


def test_the_program_says_so_if_the_encoder_has_too_few_layers(train, capsys):
    with pytest.raises(SystemExit) as refused:
        train(layers_as_negatives=2)
    assert refused.value.code == 2 and "expected at most 1" in capsys.readouterr().err


def test_a_stopped_run_goes_on_exactly(train, stopped):
    whole = load_file(train(out="whole", steps=9) / "model.safetensors")
    stopped(4, train, out="parts", steps=9)
    parts = load_file(train("--resume", out="parts", steps=9) / "model.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# ---- over-smoothing -------------------------------------------------------------------------

def test_token_similarity_is_the_mean_cosine_over_pairs_of_tokens():
    torch.manual_seed(0)
    x, mask = torch.randn(7, 5, 3).double(), torch.arange(5) < torch.tensor([2, 3, 4, 5, 2, 3, 5])[
        :, None]
    for sentence, real, found in zip(x, mask, token_similarity(x, mask)):
        m = int(real.sum())
        pairs = [F.cosine_similarity(sentence[u], sentence[v], dim=0)
                 for u in range(m) for v in range(m) if u != v]
        assert found.item() == pytest.approx(sum(pairs).item() / len(pairs), abs=1e-12)
        assert -1 / (m - 1) - 1e-12 <= found <= 1 + 1e-12


def similarity(*tokens):
    x = torch.tensor([tokens], dtype=torch.double)
    return token_similarity(x, torch.ones(x.shape[:2], dtype=torch.bool)).item()


def test_token_similarity_of_known_sentences():
    assert similarity((1, 0), (1, 1), (0, 1)) == pytest.approx(.471405, abs=1e-6)
    assert similarity((1, 2), (1, 2), (1, 2)) == pytest.approx(1)
    assert similarity((1, 0, 0), (0, 1, 0), (0, 0, 1)) == pytest.approx(0)
    assert similarity((3, 0), (.1, .1), (0, 7)) == pytest.approx(.471405, abs=1e-6)
    assert similarity((1, 0), (-1, 0)) == pytest.approx(-1)
    assert math.isnan(similarity((.6, .7)))                       # one token has no pair


class Stub(nn.Module):
    """An encoder whose every layer is known: (1, 0) -> (1, 1) -> (0, 2), for each token."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(1, 1)

    def forward(self, ids, mask):
        layers = torch.tensor([[1., 0.], [1., 1.], [0., 2.]])
        return [x * mask[:, :, None] for x in layers[:, None, None].expand(-1, *ids.shape, -1)]


@pytest.mark.parametrize("pooling", ["cls", "mean", "first-last"])
def test_set_similarity_is_that_of_neighbouring_layers(pooling):
    model = encoder(pooling=pooling)
    model.encoder = Stub()

    def tokenizer(texts, max_tokens):
        lengths = torch.tensor([len(text.split()) for text in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return mask.long(), mask
    found = oversmoothing(model, tokenizer, ["a b c", "a", "a b"], batch_size=2)
    assert [row["SetSim"] for row in found[1:]] == pytest.approx([.707107, .707107], abs=1e-6)
    assert math.isnan(found[0]["SetSim"])
    assert [row["TokSim"] for row in found] == pytest.approx([1, 1, 1], abs=1e-6)


def test_the_measures_do_not_depend_on_padding_or_the_size_of_a_batch(tiny):
    model, tokenizer = eval_sts.open_encoder(tiny)
    texts = ["a dog", "my owl sees us and it waits", "one bee digs here"]
    alone, together = (oversmoothing(model, tokenizer, texts, batch_size=n) for n in (1, 3))
    assert len(alone) == 3                                        # embeddings and two layers
    for a, b in zip(alone, together):
        assert a["TokSim"] == pytest.approx(b["TokSim"], abs=1e-5)
        assert a["SetSim"] == pytest.approx(b["SetSim"], abs=1e-5, nan_ok=True)


def test_dropout_and_the_head_have_no_part_in_them(tiny):
    model, tokenizer = eval_sts.open_encoder(tiny)
    plain = oversmoothing(model, tokenizer, ["a dog runs", "a cat"])
    model = load(tiny, dropout=.5).train()
    model.head = Head(32)
    again = oversmoothing(model, tokenizer, ["a dog runs", "a cat"])
    assert [row["TokSim"] for row in again] == [row["TokSim"] for row in plain]
    assert [row["SetSim"] for row in again[1:]] == [row["SetSim"] for row in plain[1:]]


def test_the_table_has_a_row_for_the_embeddings_and_every_layer():
    layers = [{"TokSim": .1, "SetSim": math.nan}, {"TokSim": .25, "SetSim": -.5}]
    assert layer_table(layers).splitlines() == [
        "|      layer | TokSim | SetSim |", "| ---------: | -----: | -----: |",
        "| embeddings |  0.100 |      - |", "|          1 |  0.250 | -0.500 |"]


def test_the_score_script_prints_it_and_writes_it_to_the_json(tiny, pairs, tmp_path, capsys):
    eval_sts.main([str(tiny), "--test", str(pairs), "--oversmoothing", "--json",
                   str(tmp_path / "all.json")])
    assert "| embeddings |" in capsys.readouterr().out
    layers = json.loads((tmp_path / "all.json").read_text())["oversmoothing"]
    assert len(layers) == 3 and layers[0]["SetSim"] is None and 0 < layers[2]["TokSim"] <= 1

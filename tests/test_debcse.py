"""DebCSE, in the style of: pairs drawn against the habits of the rules that propose them."""

import json
import random
import shutil
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from config import Config, resolve
from data import Tokenizer, read_corpus
from folders import load
from losses import LOSSES, info_nce
from corpus_methods import REWRITINGS, DebCSE
from methods import Encoded
from papers import check
from model import Encoder, EncoderConfig, SentenceEncoder, encode


@dataclass(frozen=True)
class Texts:
    columns: list[list[str]]
    documents: list[int] | None = None


WORDS = "the a dog cat owl elk bee cow ant fox runs sees eats reads sings sleeps".split()
RNG = random.Random(5)
CORPUS = Texts([[" ".join(RNG.sample(WORDS, 6)) for _ in range(120)]])


def method(corpus=CORPUS, **settings):
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, len(WORDS), 1, 1, 5)), pooling="cls")
    return DebCSE(corpus, replace(Config(method="debcse"), **settings), model=model)


# ---- the loss -------------------------------------------------------------------------------

def test_the_loss_of_the_worked_example():
    h = torch.eye(2, dtype=torch.float64)
    plus = torch.tensor([[.8, .6], [.6, .8]]).double()
    minus = torch.tensor([[.6, -.8], [-.8, .6]]).double()
    rows = torch.tensor([0, 1])
    for temperature, expected in ((.1, .239545), (.05, .035976)):
        found = method(temperature=temperature).loss(Encoded([h, plus, minus], 1, 9, rows))
        assert found.item() == pytest.approx(expected, abs=1e-6)
    without = method().loss(Encoded([h, plus], 1, 9, rows))
    assert without.item() == pytest.approx(.018150, abs=1e-6)


def columns(V=3, B=5, D=4):
    torch.manual_seed(0)
    return [torch.randn(B, D).double().requires_grad_() for _ in range(V)]


def test_without_hard_negatives_and_masks_it_is_simcse():
    anchor, positive = columns(2)
    out = Encoded([anchor, positive], 1, 9, torch.arange(5))
    assert torch.equal(method().loss(out), info_nce(anchor, positive))


def masked(debcse, rows, limit=.1):
    """A batch of these rows with reference vectors by chance: the loss, and the slow one."""
    torch.manual_seed(1)
    debcse.reference.normal_(), debcse.of_positives.normal_(), debcse.limit.fill_(limit)
    anchor, positive, negative = columns()
    draw = sum(rows) % len(debcse.positives)
    weight, left_out = torch.ones(5, 10), 0
    for i in range(5):
        for j in range(5):
            its, other = debcse.reference[rows[i]], debcse.of_positives[draw * 120 + rows[j]]
            alike = torch.cosine_similarity(its.float(), other.float(), dim=0)
            if i != j and alike > limit:
                weight[i, j], left_out = 0, left_out + 1
    found = debcse.loss(Encoded([anchor, positive, negative], 1, 9, torch.tensor(rows)))
    assert 0 < left_out < 20 and debcse.logs() == {"false_negatives": pytest.approx(left_out / 20)}
    return found, info_nce(anchor, torch.cat([positive, negative]), weight=weight)


@pytest.mark.parametrize("epochs, rows", [(1, [3, 0, 119, 60, 61]), (3, [3, 0, 119, 60, 61]),
                                          (3, [4, 0, 119, 60, 61])])
def test_positives_of_others_that_the_reference_finds_alike_are_left_out(epochs, rows):
    found, expected = masked(method(epochs=epochs), rows)
    assert torch.equal(found, expected)


def test_the_own_positive_always_stays():
    debcse = method()
    debcse.reference.fill_(1), debcse.of_positives.fill_(1), debcse.limit.fill_(.5)
    anchor, positive, negative = columns()
    found = debcse.loss(Encoded([anchor, positive, negative], 1, 9, torch.arange(5)))
    own = torch.cat([torch.eye(5), torch.ones(5, 5)], dim=1)
    assert found.isfinite() and torch.equal(found, info_nce(
        anchor, torch.cat([positive, negative]), weight=own))


@pytest.mark.parametrize("loss", LOSSES)
def test_all_three_views_are_learned_from_whatever_the_loss(loss):
    out = Encoded(columns(), 1, 9, torch.arange(5))
    debcse = method(loss=loss)
    debcse.loss(out).backward()
    assert all(x.grad.any() for x in out.columns)
    assert not list(debcse.parameters())                          # the reference is only asked


# ---- the pairs ------------------------------------------------------------------------------

def bag(texts, *, pooling=None, max_tokens=None):
    """A reference that sees which words there are, and of what kind they are."""
    assert max_tokens == 32
    found = torch.zeros(len(texts), len(WORDS))
    for row, text in zip(found, texts):
        for word in text.split():
            row[WORDS.index(word)] += 1
    return found


@pytest.fixture(scope="module")
def prepared():
    debcse = method(epochs=2, twin_rate=.25)
    debcse.prepare(bag, seed=0)
    return debcse


def test_a_number_is_a_row_or_one_of_its_rewritings(prepared):
    texts = CORPUS.columns[0]
    assert [prepared.text(n) for n in (0, 119)] == [texts[0], texts[119]]
    for rewriting in range(1, len(REWRITINGS) + 1):
        number = 120 * rewriting + 7
        text = prepared.text(number)
        assert text == prepared.text(number) and set(text.split()) <= set(texts[7].split())
        lengths = [len(prepared.text(120 * rewriting + row).split()) for row in range(120)]
        repeats = rewriting % 2                                   # the others delete
        assert max(lengths) > 6 if repeats else min(lengths) < 6


def test_the_views_are_the_pairs_that_were_drawn(prepared):
    rows = [5, 3, 9]
    anchor, positive, negative = prepared.views(rows, random.Random(0))
    draw = sum(rows) % 2
    assert anchor == [CORPUS.columns[0][row] for row in rows]
    assert positive == [prepared.text(prepared.positives[draw, row].item()) for row in rows]
    assert negative == [CORPUS.columns[0][prepared.negatives[draw, row]] for row in rows]


def test_other_batches_take_other_draws(prepared):
    """In the next pass a row sits in another batch, and batches differ in the sum of their rows."""
    pairs = {tuple(column[0] for column in prepared.views([row, other], random.Random(0)))
             for row in range(20) for other in (30, 31)}
    assert len(pairs) > 30


def test_the_negatives_are_below_the_limit_and_the_positives_far_above(prepared):
    texts, limit = CORPUS.columns[0], prepared.limit.item()
    x = bag(texts, max_tokens=32)
    for draw in range(2):
        unlike = torch.cosine_similarity(x, x[prepared.negatives[draw].long()])
        assert unlike.max() <= limit + 1e-3
        positives = [prepared.text(n) for n in prepared.positives[draw].tolist()]
        alike = torch.cosine_similarity(x, bag(positives, max_tokens=32))
        assert alike.min() > limit
    twins = (prepared.positives == torch.arange(120)).float().mean()
    assert .1 < twins < .6


def test_the_reference_vectors_belong_to_the_draws(prepared):
    positives = [prepared.text(n) for n in prepared.positives.flatten().tolist()]
    assert torch.equal(prepared.of_positives.float(), bag(positives, max_tokens=32))
    assert torch.equal(prepared.reference.float(), bag(CORPUS.columns[0], max_tokens=32))


def test_a_twin_rate_of_one_leaves_only_twins():
    debcse = method(twin_rate=1.)
    debcse.prepare(bag, seed=0)
    anchor, positive, _ = debcse.views([4, 2], random.Random(0))
    assert anchor == positive


def test_without_a_trained_reference_it_warns(capsys):
    method().prepare(bag, seed=0)
    assert "WARNING: meaning is judged by mini as it starts" in capsys.readouterr().err


# ---- settings -------------------------------------------------------------------------------

@pytest.mark.parametrize("model_type, width, expected", [
    ("bert", 768, (64, 3e-5)), ("roberta", 768, (128, 1e-5)), ("bert", 256, (128, 1e-5))])
def test_the_defaults_go_by_the_encoders_size(model_type, width, expected):
    config = resolve({"method": "debcse"}, model_type=model_type, width=width, columns=1)
    assert (config.batch_size, config.learning_rate) == expected
    assert (config.twin_rate, config.propensity_bins, config.epochs) == (.25, 10, 1)


def test_a_text_view_is_refused_since_positives_are_drawn():
    with pytest.raises(ValueError, match="--method debcse draws positives of its own"):
        check(Config(method="debcse", positives="crop"), 1)


# ---- runs -----------------------------------------------------------------------------------

@pytest.fixture
def train(program):
    return partial(program, method="debcse", steps=6)


def test_a_run_asks_its_teacher_and_leaves_it_as_it_was(train, tiny, sentences, tmp_path,
                                                         capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    before = (teacher / "model.safetensors").read_bytes()
    state = torch.load(train("--keep-state", teacher=teacher) / "state.pt", weights_only=True)
    assert "WARNING" not in capsys.readouterr().err
    assert (teacher / "model.safetensors").read_bytes() == before
    texts = read_corpus(str(sentences)).columns[0]
    expected = encode(load(teacher), Tokenizer.read(teacher), texts, max_tokens=32)
    assert torch.allclose(state["parts"]["method.reference"].float(), expected, atol=1e-2)


def test_a_run_that_goes_on_ends_with_the_same_weights(train, stopped, monkeypatch):
    whole = (train(out="whole") / "model.safetensors").read_bytes()
    stopped(3, train, out="again")
    monkeypatch.setattr(DebCSE, "prepare", lambda *_: pytest.fail("the pairs are in the state"))
    assert (train("--resume", out="again") / "model.safetensors").read_bytes() == whole


def test_the_log_says_how_many_others_were_left_out(train):
    folder = train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[-1]["false_negatives"] <= 1


def test_a_teacher_that_is_not_there_is_refused_before_the_first_step(train, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(teacher=tmp_path / "nowhere")
    assert stopped.value.code == 3 and "nowhere" in capsys.readouterr().err


def test_a_dry_run_needs_no_pairs(train, capsys):
    train("--dry-run")
    assert "saved and reloaded with equal vectors: yes" in capsys.readouterr().out

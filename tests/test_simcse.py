"""SimCSE: what it makes of rows, and of what the encoder returned; its masked-LM term."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from data import Corpus, Tokenizer, read_corpus, step_seed
from engine.encoders import load, load_masked_lm
from losses import alignment, info_nce, uniformity
from model import Encoder, EncoderConfig, SentenceEncoder
from papers.focal import focal_info_nce
from papers.simcse import Config, Encoded, SimCSE, frozen, measures, own_hard_negative


SENTENCES = Corpus("animals", [["a dog runs", "a cat sleeps", "an owl sees", "an elk walks"]],
                   None, "", 0)
TRIPLES = Corpus("nli", [[f"{side} {i}" for i in range(4)]
                         for side in ("premise", "entailed", "denied")], None, "", 0)


def random_columns(V=2, B=2, D=3):
    torch.manual_seed(0)
    return [torch.randn(B, D).double() for _ in range(V)]


def method(corpus=SENTENCES, **settings):
    """A method on an encoder of width 3, which it never runs."""
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 3, 1, 1, 5)), pooling="cls")
    return SimCSE(corpus, Config(batch_size=2, **settings), model=model).double()


# ---- views and loss -------------------------------------------------------------------------

def test_the_positive_is_the_sentence_itself_or_changed_by_a_text_view_or_that_of_the_corpus():
    assert method().views([2, 0], random.Random(0)) == [["an owl sees", "a dog runs"]] * 2
    anchor, positive = method(positives="delete-words", rate=.5).views([0, 1], random.Random(0))
    assert anchor == ["a dog runs", "a cat sleeps"] and positive != anchor
    assert method(corpus=TRIPLES).views([3, 1], random.Random(0)) == [
        ["premise 3", "premise 1"], ["entailed 3", "entailed 1"], ["denied 3", "denied 1"]]


@pytest.mark.parametrize("corpus, V", [(SENTENCES, 2), (TRIPLES, 3)], ids=["sentences", "nli"])
def test_the_loss_is_info_nce_among_positives_and_hard_negatives(corpus, V):
    anchor, *others = columns = random_columns(V)
    found = method(corpus=corpus).loss(Encoded(columns, 1, 9))
    assert found == info_nce(anchor, torch.cat(others))


def test_the_weight_of_hard_negatives_is_that_of_equation_8():
    columns = random_columns(3, 4)
    total = 0
    for i in range(4):
        def similarity(column, j):
            return math.exp(torch.cosine_similarity(columns[0][i], columns[column][j], dim=0) / .05)
        among = sum(similarity(1, j) + (2 if j == i else 1) * similarity(2, j) for j in range(4))
        total -= math.log(similarity(1, i) / among)
    found = method(corpus=TRIPLES, hard_negative_weight=2.).loss(Encoded(columns, 1, 9))
    assert found.item() == pytest.approx(total / 4)


def test_weight_zero_leaves_the_own_hard_negative_out_and_keeps_those_of_others():
    assert own_hard_negative(torch.zeros(3, 2), 0.).tolist() == [
        [1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]]


def test_the_menus_combine():
    a, p = random_columns()
    assert method(loss="focal", hardness=.1).loss(Encoded([a, p], 1, 9)) == focal_info_nce(
        a, p, hardness=.1)
    assert method(temperature=.5).loss(Encoded([a, p], 1, 9)) == info_nce(a, p, temperature=.5)


def test_the_measures_of_a_log_line_are_those_of_the_batch():
    a, p = random_columns(2, 8)
    similarity = [[F.cosine_similarity(x, y, dim=0).item() for y in p] for x in a]
    own = [similarity[i][i] for i in range(8)]
    others = [similarity[i][j] for i in range(8) for j in range(8) if i != j]
    expected = {"positive_cosine": sum(own) / 8, "lowest_positive_cosine": min(own),
                "negative_cosine": sum(others) / 56, "alignment": alignment(a, p).item(),
                "uniformity": uniformity(a).item()}
    assert measures(Encoded([a, p], 1, 9)) == pytest.approx(expected, abs=1e-9)


def test_a_frozen_network_is_asked_without_dropout_and_is_no_part_of_the_method():
    simcse, network = method(), torch.nn.Sequential(torch.nn.Dropout(.5), torch.nn.Linear(3, 2))
    simcse.ask, x = frozen(network), torch.ones(4, 3, requires_grad=True)
    assert torch.equal(simcse.ask(x), network[1](x)) and not simcse.ask(x).requires_grad
    assert not list(simcse.parameters()) and not simcse.state_dict()


# ---- the masked-LM term ---------------------------------------------------------------------

@pytest.fixture
def with_words(tiny_lm, sentences):
    """with_words(...) -> method, model and a batch of eight sentences, in two columns."""
    def build(**settings):
        config = Config(encoder=str(tiny_lm), mlm_weight=.1, dropout=0., **settings)
        model = load(tiny_lm, pooling="cls", dropout=0.).train()
        simcse = SimCSE(read_corpus(str(sentences)), config, model=model)
        columns = simcse.views(list(range(8)), random.Random(0))
        ids, mask = Tokenizer.read(tiny_lm)([text for column in columns for text in column],
                                            max_tokens=32)
        return simcse, model, Encoded(list(model(ids, mask).chunk(2)), 1, 9, ids=ids, mask=mask)
    return build


def test_the_term_is_added_and_the_contrastive_branch_sees_no_masks(with_words, tiny_lm):
    """Written out: all logits (16, T, V), cross-entropy with -100 left out."""
    simcse, model, out = with_words()
    masked, labels = Tokenizer.read(tiny_lm).mask(out.ids, rate=.15, seed=step_seed(42, 1))
    logits = load_masked_lm(tiny_lm, model)(model.encoder(masked, out.mask)[-1])
    term = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    found = simcse.loss(out).item()
    assert found == pytest.approx((info_nce(*out.columns) + .1 * term).item(), rel=1e-5)
    assert simcse.logs() == pytest.approx({"contrastive_loss": info_nce(*out.columns).item(),
                                           "masked_lm_loss": term.item()}, rel=1e-5)


def test_with_no_token_masked_the_term_is_zero_and_with_no_weight_there_is_no_head(with_words):
    simcse, _, out = with_words(mlm_rate=0.)
    assert simcse.masked_lm_loss(out).item() == 0
    assert not list(method().parameters()) and method().logs() == {}


def test_a_run_with_the_term_ends_in_the_same_kind_of_folder(program, tiny_lm):
    from safetensors.torch import load_file
    names = load_file(program(encoder=tiny_lm, mlm_weight=.1) / "model.safetensors")
    assert not any("cls" in name or "lm_head" in name for name in names)

"""CARDS: case-switched positives, and negatives retrieved from the whole corpus."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

import papers
from conftest import at, resolved
from data import Corpus, Tokenizer
from engine.flags import check_ranges
from losses import cosine, info_nce
from model import Encoder, EncoderConfig, SentenceEncoder
from papers import cards
from papers.cards import CARDS, Config, candidate_weight
from papers.corpus import index
from papers.simcse import Encoded
from papers.views import switch_case

CORPUS = Corpus("mine.txt", [["A dog runs", "a cat", "a  DOG runs", "an owl sees", "an elk",
                              "a bee"]], None, "0", blank=0)


@pytest.fixture(autouse=True)
def nothing_found_before(monkeypatch):
    monkeypatch.setattr(cards, "FOUND", {})


def method(corpus=CORPUS, **settings):
    config = Config(**{"method": "cards", "corpus": "mine.txt", "retrieve_from": 3} | settings)
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 3, 1, 1, 5)), pooling="cls")
    return CARDS(corpus, config, model=model)


def on_an_arc(texts, *, pooling=None, max_tokens=None):
    """Every next sentence is a little farther on: the nearest are those beside it."""
    assert pooling == "mean" and max_tokens == 32
    order = {"A dog runs": 0, "a cat": 1, "an owl sees": 2, "an elk": 3, "a bee": 4}
    angles = torch.tensor([.1 * order[text] ** 1.5 for text in texts])
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def prepared(**settings):
    built = method(**settings)
    built.prepare(on_an_arc)
    return built


# ---- the search -----------------------------------------------------------------------------

def test_equal_sentences_are_one_in_the_index_which_has_the_nearest_of_each():
    built = prepared()
    assert built.texts == ["A dog runs", "a cat", "an owl sees", "an elk", "a bee"]
    assert built.nearest.tolist()[0] == [1, 2, 3] and built.nearest.tolist()[4] == [3, 2, 1]


def test_a_search_is_shared_by_runs_that_differ_in_nothing_that_matters_to_it(monkeypatch):
    searches = []
    monkeypatch.setattr(cards, "nearest_others", lambda x, k, device: (
        searches.append(1), torch.full((len(x), k), len(searches)))[1])

    def number(corpus=CORPUS, **settings):
        built = method(corpus, **settings)
        built.prepare(lambda texts, **how: torch.ones(len(texts), 2))
        return built.nearest[0, 0].item()

    assert number() == number(seed=5, retrieved=2, learning_rate=1.) == 1
    others = [dict(encoder="other"), dict(retrieve_from=2), dict(max_tokens=9),
              dict(corpus=replace(CORPUS, sha256="1")), dict(corpus=CORPUS.part(range(5)))]
    assert [number(**other) for other in others] == [2, 3, 4, 5, 6]
    assert len(cards.FOUND) == 1                                  # the table of the last is kept


# ---- the negatives that are drawn -----------------------------------------------------------

def test_the_anchor_is_original_the_positive_switched_and_the_negatives_retrieved_unchanged():
    built = prepared(retrieved=2, positives="switch-case", rate=.99)
    seen = Counter()
    for seed in range(900):
        anchor, positive, *retrieved = built.views([2, 5], random.Random(seed))
        assert anchor == ["a  DOG runs", "a bee"] and positive != anchor and len(retrieved) == 2
        assert [" ".join(text.lower().split()) for text in positive] == ["a dog runs", "a bee"]
        pick = [column[0] for column in retrieved]
        assert len(set(pick)) == 2
        seen.update(pick)
    assert set(seen) == {"a cat", "an owl sees", "an elk"}        # never itself under another case
    assert all(abs(n - 600) < 60 for n in seen.values())          # and each as often
    assert built.views([0, 3], random.Random(1)) == built.views([0, 3], random.Random(1))


def test_a_cased_tokenizer_sees_the_switch_and_an_uncased_one_does_not(tiny):
    """Whether it is cased, it is asked itself: the same words, with a normalizer and without."""
    told = json.loads((tiny / "tokenizer.json").read_text())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Paris", "paris", "is", "Is"]
    told["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    told["added_tokens"] = [token | {"id": words.index(token["content"])}
                            for token in told["added_tokens"] if token["content"] in words]
    told |= {"normalizer": None, "post_processor": None}
    for tokenizer, cased in ((Tokenizer.read(tiny), False), (Tokenizer(json.dumps(told)), True)):
        ids = tokenizer(["paris is", switch_case("paris is", random.Random(0), rate=1.)],
                        max_tokens=9)[0]
        assert tokenizer.cased == cased != torch.equal(ids[0], ids[1])


# ---- the weight of a candidate --------------------------------------------------------------

ANCHORS, POSITIVE, RETRIEVED = at(0, 90, 10, 80, 30, 45).split(2)
OTHERS = candidate_weight(torch.tensor([[7], [9]]), torch.tensor([[4], [5]]))
COLLIDING = candidate_weight(torch.tensor([[7], [9]]), torch.tensor([[4], [7]]))   # 1 is anchor 0


def test_the_worked_example_and_its_rows():
    both = torch.cat([POSITIVE, RETRIEVED])
    assert info_nce(ANCHORS, POSITIVE).item() == pytest.approx(9.0024e-08, rel=1e-4)
    assert info_nce(ANCHORS, both, weight=OTHERS).item() == pytest.approx(.048173, rel=1e-4)
    assert info_nce(ANCHORS, both, weight=COLLIDING).item() == pytest.approx(.046405, rel=1e-4)
    # Logits are 20 cos: 19.696 of the positive, 10° away; 17.321 at 30°, 14.142 at 45°, 10 at 60°.
    at_30, at_45, at_60 = (math.exp(logit - 19.696) for logit in (17.321, 14.142, 10))
    rows = [info_nce(ANCHORS[[i]], both[[i, 1 - i, 2, 3]]).item() for i in (0, 1)]
    by_hand = [math.log(1 + at_30 + at_45), math.log(1 + at_60 + at_45)]
    assert by_hand == pytest.approx([.0924, .0039], abs=1e-4)
    assert rows == pytest.approx(by_hand, abs=1e-4)


def test_alpha_stands_on_the_own_retrieved_and_zero_where_a_text_is_the_anchor():
    anchors = torch.tensor([[5, 1, 0], [5, 2, 2]])
    retrieved = torch.tensor([[3, 3, 3], [5, 1, 0], [5, 2, 2], [5, 1, 1]])     # s = 2, B = 2
    assert candidate_weight(anchors, retrieved, alpha=.5).tolist() == [
        [1, 1, .5, 0, .5, 1], [1, 1, 1, .5, 0, .5]]


def test_a_retrieved_text_has_no_gradient_from_the_anchor_that_it_is_and_has_from_the_other():
    for anchor, expected in ((0, False), (1, True)):
        retrieved = RETRIEVED.clone().requires_grad_()
        logits = cosine(ANCHORS, torch.cat([POSITIVE, retrieved])) / .05 + COLLIDING.log()
        logits[anchor].logsumexp(dim=0).backward()
        assert retrieved.grad[1].any() == expected and retrieved.grad[0].any()


def test_more_negatives_never_lower_the_loss_and_a_weight_of_zero_undoes_them():
    torch.manual_seed(0)
    a, p, n = (torch.randn(5, 3).double() for _ in range(3))
    ids = torch.arange(10)[:, None]
    plain, weight = info_nce(a, p), candidate_weight(ids[:5], ids[5:])
    assert info_nce(a, torch.cat([p, n]), weight=weight) > plain
    own_only = torch.cat([torch.ones(5, 5), torch.eye(5) * 1e-300], dim=1).double()
    assert info_nce(a, torch.cat([p, n]), weight=own_only).item() == pytest.approx(plain.item())


# ---- the loss -------------------------------------------------------------------------------

def encoded(V=3, B=4, D=5):
    torch.manual_seed(0)
    columns = [torch.randn(B, D).double().requires_grad_() for _ in range(V)]
    return Encoded(columns, 1, 9, ids=torch.arange(V * B)[:, None])


def test_without_retrieved_negatives_it_is_simcse():
    out, built = encoded(V=2), prepared(retrieved=0)
    assert torch.equal(built.loss(out), info_nce(out.anchor, out.positive))
    assert len(built.views([0, 1], random.Random(0))) == 2 and not built.nearest.any()


def test_every_anchor_sees_what_all_have_retrieved_but_for_itself():
    out = encoded(V=4)
    assert method(retrieved=2).loss(out) == info_nce(out.anchor, torch.cat(out.columns[1:]))
    out, weight = encoded(), torch.ones(4, 8)
    out.ids[8 + 2] = out.ids[1]                                   # anchor 2 retrieved anchor 1
    weight[1, 4 + 2] = 0
    expected = info_nce(out.anchor, torch.cat(out.columns[1:]), weight=weight)
    assert method().loss(out) == expected


def test_beta_is_the_logarithm_of_the_weight_on_the_own_negatives():
    out = encoded()
    logits = torch.cosine_similarity(out.anchor[:, None], torch.cat(out.columns[1:]), dim=-1) / .05
    logits[:, 4:] += torch.eye(4) * torch.tensor(2.).log()
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    assert method(hard_negative_weight=2.).loss(out).item() == pytest.approx(expected.item())


def test_the_retrieved_sentences_are_learned_from_as_well_and_their_cosine_is_logged():
    out, built = encoded(), method()
    built.loss(out).backward()
    assert all(column.grad.any() for column in out.columns)
    own = torch.cosine_similarity(out.anchor, out.columns[2]).mean().item()
    assert built.logs() == {"retrieved_cosine": pytest.approx(own)}


def test_the_order_of_the_batch_does_not_matter():
    out, order = encoded(), torch.tensor([2, 0, 3, 1])
    ids = out.ids.clone()
    ids[8 + 2] = ids[1]
    mixed = torch.cat([order, 4 + order, 8 + order])
    found = [method(hard_negative_weight=.5).loss(replace(out, columns=columns, ids=i)).item()
             for columns, i in ((out.columns, ids), ([x[order] for x in out.columns], ids[mixed]))]
    assert found[0] == pytest.approx(found[1])


# ---- settings -------------------------------------------------------------------------------

@pytest.mark.parametrize("model_type, width, expected", [
    ("roberta", 768, ("switch-case", .05, 64, 1, 512, 4e-5)),
    ("roberta", 1024, ("switch-case-quota", .1, 8, 1, 512, 7.5e-6)),
    ("bert", 768, ("switch-case", .05, 64, 1, 64, 3e-5)),
    ("bert", 1024, ("switch-case-quota", .1, 8, 1, 64, 1e-5)),
    ("bert", 256, ("switch-case", .05, 64, 1, 64, 1e-4))])
def test_the_defaults_are_those_of_the_authors_readme(model_type, width, expected):
    config = resolved("cards", model_type, width)
    assert (config.positives, config.rate, config.retrieve_from, config.retrieved,
            config.batch_size, config.learning_rate) == expected
    assert config.temperature == .05 and config.hard_negative_weight == 1


def test_drawing_more_than_there_are_is_refused():
    shape, config = EncoderConfig("bert", 7, 3, 1, 1, 5), Config(method="cards", batch_size=2)
    with pytest.raises(ValueError, match=r"--retrieved 4 must be at most --retrieve-from \(3\)"):
        papers.check(replace(config, retrieved=4, retrieve_from=3), [CORPUS], shape)
    with pytest.raises(ValueError, match="--retrieve-from 5: .* at most 4, as mine.txt has 5"):
        method(retrieve_from=5)
    with pytest.raises(ValueError, match="--retrieve-from: expected 1 or more"):
        check_ranges(replace(config, retrieve_from=0))


# ---- runs -----------------------------------------------------------------------------------

@pytest.fixture
def train(program):
    return partial(program, method="cards", steps=1, retrieve_from=8, retrieved=2)


def test_seeds_share_one_search_which_is_what_each_would_find_alone(train, monkeypatch, capsys):
    searches, tables, search, prepare = [], [], cards.nearest_others, CARDS.prepare

    def prepare_and_compare(built, encode):
        prepare(built, encode)
        vectors = index(partial(encode, pooling="mean", max_tokens=32), built.texts)
        tables.append((built.nearest.clone(), search(vectors, 8)))

    monkeypatch.setattr(cards, "nearest_others", lambda *given, **how: (
        searches.append(1), search(*given, **how))[1])
    monkeypatch.setattr(CARDS, "prepare", prepare_and_compare)
    folder = train("--seeds", "0-1")
    assert len(searches) == 1 and len(tables) == 2
    assert all(torch.equal(shared, alone) and shared.any() for shared, alone in tables)
    last = json.loads((folder / "seed-1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1 and -1 <= last["retrieved_cosine"] <= 1
    notice = [line for line in capsys.readouterr().err.splitlines() if "NOTICE" in line]
    assert len(notice) == 1 and "--positives switch-case is off" in notice[0]


def test_a_dry_run_indexes_its_first_rows_and_plans_for_all(train, capsys, monkeypatch):
    sizes, search = [], cards.nearest_others
    monkeypatch.setattr("mincse.DRY_ROWS", 16)
    monkeypatch.setattr(cards, "nearest_others", lambda x, *given, **how: (
        sizes.append(len(x)), search(x, *given, **how))[1])
    train("--dry-run", steps=None, epochs=1, batch_size=8, positives="dropout")
    said = capsys.readouterr()
    assert sizes == [32, 32]        # four batches, of 64 sentences; the search alone once more
    assert "steps: 8 " in said.out and "before the first step: 0." in said.out
    assert "saved and reloaded with equal vectors: yes" in said.out
    assert "NOTICE" not in said.err                               # nothing to say of switch-case

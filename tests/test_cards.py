"""CARDS: case-switched positives, and negatives retrieved from the whole corpus."""

import json
import random
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from config import Config, resolve, validate
from data import Tokenizer
from losses import LOSSES, info_nce
from corpus_methods import CARDS
from methods import Encoded
from papers import check
from mincse import row_order
from model import Encoder, EncoderConfig, SentenceEncoder
from positives import POSITIVES, flip, switch_case, switch_case_quota

SENTENCE = "When 12th Night opened (in London) the critics of 1601 were not amused"


# ---- switch-case ----------------------------------------------------------------------------

@pytest.mark.parametrize("word, other", [("Thebes", "thebes"), ("when", "When"), ("USA", "uSA"),
                                         ("12th", "12th"), ("(in", "(in"), ("été", "Été")])
def test_flip_changes_the_case_of_a_first_letter_and_back(word, other):
    assert flip(word) == other and flip(other) == word


@pytest.mark.parametrize("word", ["ßa", "東京", "İzmir"])
def test_what_has_no_single_letter_of_another_case_stays(word):
    assert flip(word) == word


def changed(view, sentence, seed, **settings):
    before = sentence.split()
    after = view(sentence, random.Random(seed), **settings).split()
    assert [word.lower() for word in after] == [word.lower() for word in before]
    return [i for i, (a, b) in enumerate(zip(before, after)) if a != b]


@pytest.mark.parametrize("words, rate, quota", [(10, .05, 1), (50, .05, 2), (25, .1, 2), (1, .1, 1),
                                                (40, .1, 4)])
def test_the_quota_is_flipped_exactly_and_is_one_at_least(words, rate, quota):
    for seed in range(20):
        assert len(changed(switch_case_quota, " ".join(["word"] * words), seed, rate=rate)) == quota


def test_the_quota_passes_over_words_without_a_letter_and_takes_any_of_the_others():
    assert len(changed(switch_case_quota, "1 2 3 four 5", 0, rate=.1)) == 1
    assert changed(switch_case_quota, "1 2 (x)", 0, rate=.5) == []
    assert {i for seed in range(200) for i in changed(switch_case_quota, SENTENCE, seed)} == {
        0, 2, 3, 5, 6, 7, 8, 10, 11, 12}


def test_independent_flips_keep_to_their_rate():
    assert changed(switch_case, SENTENCE, 0, rate=0) == []
    assert changed(switch_case, SENTENCE, 0, rate=1.) == [0, 2, 3, 5, 6, 7, 8, 10, 11, 12]
    unchanged = sum(not changed(switch_case, "a " * 20, seed, rate=.05) for seed in range(4000))
    assert unchanged / 4000 == pytest.approx(.358, abs=.03)       # 0.95^20


# ---- tokenizers with and without case -------------------------------------------------------

def cased(folder):
    """The tokenizer of a folder with its normalizer told to keep the case."""
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["normalizer"] = None
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                                               "Paris", "paris", "is", "Is"])}
    settings["model"]["vocab"] = words
    settings["added_tokens"] = [token | {"id": words[token["content"]]}
                                for token in settings["added_tokens"] if token["content"] in words]
    settings["post_processor"] = None
    return Tokenizer(json.dumps(settings))


def test_whether_a_tokenizer_is_cased_is_asked_of_itself(tiny):
    uncased = Tokenizer.read(tiny)
    assert not uncased.cased and cased(tiny).cased
    for tokenizer, same in ((uncased, True), (cased(tiny), False)):
        ids = tokenizer(["paris is", switch_case("paris is", random.Random(0), rate=1.)],
                        max_tokens=9)[0]
        assert torch.equal(ids[0], ids[1]) == same


# ---- the method -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Texts:
    columns: list[list[str]]

    def __len__(self):
        return len(self.columns[0])


CORPUS = Texts([["A dog runs", "a cat", "a  DOG runs", "an owl sees", "an elk", "a bee"]])


def method(corpus=CORPUS, **settings):
    config = Config(method="cards", corpus="mine.txt", retrieve_from=3)
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 3, 1, 1, 5)), pooling="cls")
    return CARDS(corpus, replace(config, **settings), model=model)


def fake_encode(texts, *, pooling=None, max_tokens=None):
    """Points on a line of sight each: the nearest are the next ones in this order."""
    assert pooling == "mean" and max_tokens == 32
    order = {"A dog runs": 0, "a cat": 1, "an owl sees": 2, "an elk": 3, "a bee": 4}
    angles = torch.tensor([.1 * order[text] ** 1.5 for text in texts])
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def prepared(**settings):
    cards = method(**settings)
    cards.prepare(fake_encode, seed=0)
    return cards


def test_equal_sentences_are_one_in_the_index_which_has_the_nearest_of_each(capsys):
    cards = prepared()
    assert cards.texts == ["A dog runs", "a cat", "an owl sees", "an elk", "a bee"]
    assert cards.nearest.tolist()[0] == [1, 2, 3] and cards.nearest.tolist()[4] == [3, 2, 1]
    assert "the index of all sentences needs" in capsys.readouterr().err


def test_the_anchor_is_original_the_positive_switched_and_the_negatives_retrieved_unchanged():
    cards = prepared(retrieved=2, positives="switch-case", rate=.99)
    seen = set()
    for seed in range(30):
        anchor, positive, *retrieved = cards.views([2, 5], random.Random(seed))
        assert anchor == ["a  DOG runs", "a bee"] and positive != anchor and len(retrieved) == 2
        assert [text.lower() for text in positive] == ["a dog runs", "a bee"]
        pick = [column[0] for column in retrieved]
        assert len(set(pick)) == 2
        seen |= set(pick)
    assert seen == {"a cat", "an owl sees", "an elk"}             # never itself under another case


def test_the_views_are_a_function_of_rows_and_seed():
    cards = prepared(positives="switch-case")
    assert cards.views([0, 3], random.Random(1)) == cards.views([0, 3], random.Random(1))


def encoded(V=3, B=4, D=5, ids=None, seed=0):
    torch.manual_seed(seed)
    ids = torch.arange(V * B)[:, None] if ids is None else ids
    return Encoded([torch.randn(B, D).double().requires_grad_() for _ in range(V)], 1, 9, ids=ids)


def test_every_anchor_sees_what_all_have_retrieved():
    out = encoded(V=4)
    assert torch.equal(method(retrieved=2).loss(out),
                       info_nce(out.anchor, torch.cat(out.columns[1:])))


def test_without_retrieved_negatives_it_is_simcse():
    out = encoded(V=2)
    cards = prepared(retrieved=0)
    assert torch.equal(cards.loss(out), info_nce(out.anchor, out.positive))
    assert len(cards.views([0, 1], random.Random(0))) == 2 and not cards.nearest.any()


def test_a_retrieved_sentence_that_is_another_anchor_counts_for_all_others():
    ids = torch.arange(12)[:, None]
    ids[8 + 2] = ids[1]                                           # anchor 2 retrieved anchor 1
    out = encoded(ids=ids)
    weight = torch.ones(4, 8)
    weight[1, 4 + 2] = 0
    assert torch.equal(method().loss(out), info_nce(out.anchor, torch.cat(out.columns[1:]),
                                                    weight=weight))


def test_beta_is_the_logarithm_of_the_weight_on_the_own_negatives():
    out = encoded()
    logits = torch.cosine_similarity(out.anchor[:, None], torch.cat(out.columns[1:]), dim=-1) / .05
    logits[:, 4:] += torch.eye(4) * torch.tensor(2.).log()
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    assert method(hard_negative_weight=2.).loss(out).item() == pytest.approx(expected.item())


def test_the_retrieved_sentences_are_learned_from_as_well():
    out = encoded()
    cards = method()
    cards.loss(out).backward()
    assert all(column.grad.any() for column in out.columns)
    own = torch.cosine_similarity(out.anchor, out.columns[2]).mean().item()
    assert cards.logs() == {"retrieved_cosine": pytest.approx(own)}


def test_the_order_of_the_batch_does_not_matter():
    out, order = encoded(), torch.tensor([2, 0, 3, 1])
    ids = out.ids.clone()
    ids[8 + 2] = ids[1]
    mixed = torch.cat([order, 4 + order, 8 + order])
    found = [method(hard_negative_weight=.5).loss(replace(out, columns=columns, ids=i)).item()
             for columns, i in ((out.columns, ids), ([x[order] for x in out.columns], ids[mixed]))]
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("positives", POSITIVES)
def test_every_loss_and_view_goes_with_retrieved_negatives(loss, positives):
    cards, out = prepared(loss=loss, positives=positives), encoded()
    check(cards.config, columns=1)
    assert len(cards.views([0, 1], random.Random(0))) == 3
    cards.loss(out).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in out.columns)


# ---- settings -------------------------------------------------------------------------------

@pytest.mark.parametrize("model_type, width, expected", [
    ("roberta", 768, ("switch-case", .05, 64, 1, 512, 4e-5)),
    ("roberta", 1024, ("switch-case-quota", .1, 8, 1, 512, 7.5e-6)),
    ("bert", 768, ("switch-case", .05, 64, 1, 64, 3e-5)),
    ("bert", 1024, ("switch-case-quota", .1, 8, 1, 64, 1e-5)),
    ("bert", 256, ("switch-case", .05, 64, 1, 64, 1e-5))])
def test_the_defaults_are_those_of_the_authors_readme(model_type, width, expected):
    config = resolve({"method": "cards"}, model_type=model_type, width=width, columns=1)
    assert (config.positives, config.rate, config.retrieve_from, config.retrieved,
            config.batch_size, config.learning_rate) == expected
    assert config.temperature == .05 and config.hard_negative_weight == 1


def test_drawing_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"--retrieved 4 must be at most --retrieve-from \(3\)"):
        check(Config(method="cards", retrieved=4, retrieve_from=3), 1)
    with pytest.raises(ValueError, match="--retrieve-from 5: .* at most 4, as mine.txt has 5"):
        method(retrieve_from=5)
    with pytest.raises(ValueError, match="--retrieve-from: expected above 0"):
        validate(Config(retrieve_from=0))


def test_pairs_are_refused():
    with pytest.raises(ValueError, match="--method cards takes a corpus of 1 columns, found 2"):
        check(Config(method="cards"), 2)


# ---- runs -----------------------------------------------------------------------------------

@pytest.fixture
def train(program):
    return partial(program, method="cards", steps=6, retrieve_from=8, retrieved=2)


def test_a_run_logs_the_cosine_to_its_negatives_and_says_that_switch_case_is_off(train, capsys):
    folder = train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and -1 <= rows[-1]["retrieved_cosine"] <= 1
    notice = [line for line in capsys.readouterr().err.splitlines() if "NOTICE" in line]
    assert len(notice) == 1 and "--positives switch-case is off" in notice[0]


def test_without_switch_case_there_is_nothing_to_say(train, capsys):
    train(positives="dropout")
    assert "NOTICE" not in capsys.readouterr().err


def test_a_run_that_goes_on_ends_with_the_same_weights(train, stopped, monkeypatch):
    whole = (train(out="whole") / "model.safetensors").read_bytes()
    stopped(3, train, out="again")
    monkeypatch.setattr(CARDS, "prepare", lambda *_: pytest.fail("the table is in the state"))
    assert (train("--resume", out="again") / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("refresh, searches", [(0, 1), (3, 4)])
def test_seeds_share_the_index_of_the_given_encoder(refresh, searches, train, monkeypatch):
    made, prepare = [], CARDS.prepare
    monkeypatch.setattr(CARDS, "prepare", lambda method, encode, seed: (
        made.append(seed), prepare(method, encode, seed)))
    folder = train("--seeds", "0-1", refresh=refresh)
    assert len(made) == searches                                  # --refresh 3: two in each run
    alone = train(seed=1, refresh=refresh, out="alone")
    assert ((folder / "seed-1" / "model.safetensors").read_bytes()
            == (alone / "model.safetensors").read_bytes())


def test_with_refresh_the_index_is_made_anew_by_the_encoder_in_training(train, monkeypatch):
    seen, prepare = [], CARDS.prepare
    monkeypatch.setattr(CARDS, "prepare", lambda method, encode, seed: (
        seen.append(encode(["the dog runs home."])), prepare(method, encode, seed)))
    train(refresh=2, steps=5)
    assert len(seen) == 3                                         # before steps 1, 3 and 5
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_with_refresh_a_run_that_goes_on_ends_with_the_same_weights(train, stopped):
    whole = (train(refresh=2, out="whole") / "model.safetensors").read_bytes()
    stopped(3, train, refresh=2, out="again")
    assert (train("--resume", refresh=2, out="again") / "model.safetensors").read_bytes() == whole


def test_a_refresh_keeps_the_order_of_the_rows():
    orders = [list(row_order(method(refresh=refresh, batch_size=2), Config(batch_size=2), 5))
              for refresh in (0, 2)]
    assert orders[0] == orders[1]


def test_a_corpus_smaller_than_the_pool_is_refused_before_the_first_step(train, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(retrieve_from=64)
    assert stopped.value.code == 3
    assert "--retrieve-from 64: expected at most 63" in capsys.readouterr().err


def test_a_dry_run_indexes_its_first_rows_and_plans_for_all(train, capsys, monkeypatch):
    sizes, prepare = [], CARDS.prepare
    monkeypatch.setattr("mincse.DRY_ROWS", 16)
    monkeypatch.setattr(CARDS, "prepare", lambda method, encode, seed: (
        sizes.append(len(method.texts)), prepare(method, encode, seed)))
    train("--dry-run", steps=0, batch_size=8)
    said = capsys.readouterr().out
    assert sizes == [32]                                          # four batches, of 64 sentences
    assert "steps: 8 of 8 rows" in said and "before the first step: 0." in said
    assert "saved and reloaded with equal vectors: yes" in said

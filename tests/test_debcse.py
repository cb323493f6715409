"""DebCSE, in the style of: pairs drawn against the habits of the rules that propose them."""

import json
import math
import random
import shutil
from collections import Counter

import pytest
import torch

import papers
from conftest import resolved
from data import Corpus, Tokenizer, read_corpus
from engine.encoders import load
from losses import info_nce
from model import Encoder, EncoderConfig, SentenceEncoder, encode
from papers.corpus import EMPTY
from papers.debcse import (VERSIONS, Config, DebCSE, debiased_pairs, draw_weighted, edit_distance,
                           inverse_propensity, negative_pool, positive_pool, propensity,
                           random_others, rare_word_neighbours, similarities, surface_bin,
                           word_numbers)
from papers.simcse import Encoded

WORDS = "the a dog cat owl elk bee cow ant fox runs sees eats reads sings sleeps".split()
SHAPE = EncoderConfig("bert", 7, len(WORDS), 1, 1, 5)
RNG = random.Random(5)
TEXTS = [" ".join(RNG.sample(WORDS, 6)) for _ in range(120)]


def corpus_of(texts):
    return Corpus("mine.txt", [texts], None, "0", blank=0)


def method(**settings):
    model = SentenceEncoder(Encoder(SHAPE), pooling="cls")
    return DebCSE(corpus_of(TEXTS), Config(method="debcse", **settings), model=model)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the loss -------------------------------------------------------------------------------

def test_the_loss_of_the_worked_example():
    h = torch.eye(2, dtype=torch.float64)
    plus = torch.tensor([[.8, .6], [.6, .8]]).double()
    minus = torch.tensor([[.6, -.8], [-.8, .6]]).double()
    for temperature, expected in ((.1, .239545), (.05, .035976)):
        out = Encoded([h, plus, minus], 1, 9, torch.tensor([0, 1]))
        assert method(temperature=temperature).loss(out).item() == pytest.approx(expected, abs=1e-6)
    assert info_nce(h, plus).item() == pytest.approx(.018150, abs=1e-6)    # without negatives


def columns(V=3, B=5, D=4):
    torch.manual_seed(0)
    return [torch.randn(B, D).double().requires_grad_() for _ in range(V)]


def test_without_false_negatives_it_is_simcse_with_a_hard_negative_and_its_weight():
    out = Encoded(columns(), 1, 9, torch.arange(5))
    candidates, weight = torch.cat(out.columns[1:]), torch.ones(5, 10).double()
    assert torch.equal(method().loss(out), info_nce(out.anchor, candidates))
    weight[range(5), range(5, 10)] = .5
    assert torch.equal(method(hard_negative_weight=.5).loss(out),
                       info_nce(out.anchor, candidates, weight=weight))


@pytest.mark.parametrize("epochs, rows", [(1, [3, 0, 119, 60, 61]), (3, [3, 0, 119, 60, 61]),
                                          (3, [4, 0, 119, 60, 61])])
def test_positives_of_others_that_mean_the_same_to_the_teacher_are_left_out(epochs, rows):
    """The slow one: pair by pair, for teacher's vectors by chance."""
    built, draw, left_out = method(epochs=epochs), sum(rows) % epochs, 0
    torch.manual_seed(1)
    built.of_sentences.normal_(), built.of_positives.normal_(), built.limit.fill_(.1)
    anchor, positive, negative = columns()
    weight = torch.ones(5, 10)
    for i in range(5):
        for j in range(5):
            its, other = built.of_sentences[rows[i]], built.of_positives[draw, rows[j]]
            if i != j and torch.cosine_similarity(its.float(), other.float(), dim=0) > .1:
                weight[i, j], left_out = 0, left_out + 1
    found = built.loss(Encoded([anchor, positive, negative], 1, 9, torch.tensor(rows)))
    assert torch.equal(found, info_nce(anchor, torch.cat([positive, negative]), weight=weight))
    assert 0 < left_out < 20 and built.logs() == {"false_negatives": pytest.approx(left_out / 20)}


def test_the_own_positive_always_stays():
    built, out = method(), Encoded(columns(), 1, 9, torch.arange(5))
    built.of_sentences.fill_(1), built.of_positives.fill_(1), built.limit.fill_(.5)
    found, own = built.loss(out), torch.cat([torch.eye(5), torch.ones(5, 5)], dim=1)
    assert found.isfinite() and torch.equal(found, info_nce(
        out.anchor, torch.cat(out.columns[1:]), weight=own))


# ---- what is prepared -----------------------------------------------------------------------

def bag(texts, *, pooling=None, max_tokens=None):
    """A teacher that sees which words there are, and nothing else."""
    assert max_tokens == 32
    found = torch.zeros(len(texts), len(WORDS))
    for row, text in zip(found, texts):
        for word in text.split():
            row[WORDS.index(word)] += 1
    return found


@pytest.fixture(scope="module")
def prepared():
    built = method(epochs=2)
    built.prepare(bag)
    return built


def test_a_number_is_a_sentence_or_one_of_its_changed_versions(prepared):
    assert [prepared.text(n) for n in (0, 119)] == [TEXTS[0], TEXTS[119]]
    for version in range(1, len(VERSIONS)):
        text, again = (prepared.text(120 * version + 7) for _ in range(2))
        assert text == again and set(text.split()) <= set(TEXTS[7].split())
        lengths = [len(prepared.text(120 * version + row).split()) for row in range(120)]
        assert max(lengths) > 6 if version % 2 else min(lengths) < 6   # words repeated or deleted


def test_the_views_are_the_pairs_that_were_drawn_other_ones_in_other_batches(prepared):
    rows, draw = [5, 3, 9], (5 + 3 + 9) % 2
    anchor, positive, negative = prepared.views(rows, random.Random(0))
    assert anchor == [TEXTS[row] for row in rows]
    assert positive == [prepared.text(prepared.positives[draw, row].item()) for row in rows]
    assert negative == [TEXTS[prepared.negatives[draw, row]] for row in rows]
    # In the next pass a row sits in another batch, and batches differ in the sum of their rows.
    pairs = {tuple(column[0] for column in prepared.views([row, other], random.Random(0)))
             for row in range(20) for other in (30, 31)}
    assert len(pairs) > 30


def test_the_negatives_are_below_the_limit_and_the_positives_far_above(prepared):
    x, limit = bag(TEXTS, max_tokens=32), prepared.limit.item()
    for draw in range(2):
        unlike = torch.cosine_similarity(x, x[prepared.negatives[draw].long()])
        assert unlike.max() <= limit + 1e-3
        positives = [prepared.text(n) for n in prepared.positives[draw].tolist()]
        assert torch.cosine_similarity(x, bag(positives, max_tokens=32)).min() > limit
    itself = (prepared.positives == torch.arange(120)).float().mean()
    assert .1 < itself < .6


def test_the_teachers_vectors_belong_to_the_draws_and_all_is_in_the_state(prepared):
    again = method(epochs=2)
    again.load_state_dict(prepared.state_dict())                  # as a run that goes on has it
    for draw, numbers in enumerate(again.positives.tolist()):
        texts = [prepared.text(n) for n in numbers]
        assert torch.equal(again.of_positives[draw].float(), bag(texts, max_tokens=32))
    assert torch.equal(again.of_sentences.float(), bag(TEXTS, max_tokens=32))
    assert again.views([5, 3], None) == prepared.views([5, 3], None)


def test_a_rate_of_one_leaves_each_its_own_positive_and_a_raw_teacher_is_warned_of(capsys):
    built = method(own_rate=1.)
    built.prepare(bag)
    anchor, positive, _ = built.views([4, 2], random.Random(0))
    said = capsys.readouterr().err
    assert anchor == positive and "WARNING: meaning is judged by mini as it starts" in said
    assert "positives have a similarity of" in said and "are their only positive" in said


# ---- pools ----------------------------------------------------------------------------------

def test_random_others_are_any_but_the_own():
    found = random_others(5, 2000, generator())
    for i in range(5):
        counts = Counter(found[i].tolist())
        assert set(counts) == set(range(5)) - {i} and min(counts.values()) > 400
    assert random_others(2, 3, generator()).tolist() == [[1] * 3, [0] * 3]


def test_a_positive_pool_has_versions_the_sentences_beside_in_the_document_and_eight_nearest():
    pool = positive_pool(3, [0] * 20, torch.arange(19).expand(20, -1))
    assert pool[7].tolist() == [27, 47, 6, 8, *range(8)]
    pool = positive_pool(1, [0, 0, 0, 1, 2, 2], torch.empty(6, 0, dtype=torch.long))
    assert pool.tolist() == [
        [EMPTY, 1], [0, 2], [1, EMPTY], [EMPTY, EMPTY], [EMPTY, 5], [4, EMPTY]]
    assert (positive_pool(1, None, torch.empty(3, 0, dtype=torch.long)) == EMPTY).all()


def test_rare_word_neighbours_share_most_of_the_rare_words():
    """"u" is in five texts of eight, so it is common; a word in two texts is rare."""
    texts = ["u a b c", "u A B", "u c", "d", "u D e", "f u", "g", "h"]
    assert rare_word_neighbours(texts, 2).tolist() == [
        [1, 2], [0, EMPTY], [0, EMPTY], [4, EMPTY], [3, EMPTY]] + [[EMPTY, EMPTY]] * 3
    assert (rare_word_neighbours(texts * 700, 2) == EMPTY).all()  # of 5,600 texts: below 5.6


def test_a_negative_pool_has_random_texts_rare_words_and_some_of_the_50th_to_200th_nearest():
    texts = [f"word{i // 2} and {i}" for i in range(300)]
    pool = negative_pool(texts, torch.arange(299).expand(300, -1), generator())
    assert pool.shape == (300, 32)
    assert pool[:, 16].tolist() == [i ^ 1 for i in range(300)]    # "word7" is in two texts
    assert pool[:, 24:].min() >= 49 and pool[:, 24:].max() < 200
    assert all(len(set(row)) == 8 for row in pool[:, 24:].tolist())


# ---- similarity on the surface and in meaning -----------------------------------------------

def by_recursion(a, b):
    """Levenshtein as its definition says."""
    if not a or not b:
        return len(a) + len(b)
    return min(by_recursion(a[1:], b[1:]) + (a[0] != b[0]), by_recursion(a[1:], b) + 1,
               by_recursion(a, b[1:]) + 1)


def test_the_edit_distance_is_that_of_its_definition_from_either_side():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(120)]
    words = word_numbers(texts, most=9)
    a, b = torch.tensor([[rng.randrange(120), rng.randrange(120)] for _ in range(200)]).T
    expected = [by_recursion(texts[i].split(), texts[j].split()) for i, j in zip(a, b)]
    assert edit_distance(words[a], words[b]).tolist() == expected
    assert edit_distance(words[b], words[a]).tolist() == expected


def test_the_surface_of_two_sentences_worked_out_by_hand_where_words_behind_the_cut_do_not_count():
    a, b = word_numbers(["The cat sat on the mat", "the cat is on a mat"], most=32).split(1)
    assert edit_distance(a, b).item() == 2                        # surface 1 - 2/6
    assert surface_bin(a, b, 300).item() == 200
    assert edit_distance(*word_numbers(["a b c", "a b d"], most=2).split(1)).item() == 0


def test_bins_are_counted_in_whole_numbers_and_equal_texts_fall_into_the_last():
    ten = "a b c d e f g h i j"
    words = word_numbers([ten, "a " + " ".join("klmnopqrs"), ten.upper(), "x y"], most=32)
    assert surface_bin(words[[0, 0, 0]], words[1:], 10).tolist() == [1, 9, 0]
    assert math.floor(10 * (1 - 9 / 10)) == 0                     # what floating point makes of it


def test_similarities_are_of_meaning_and_of_surface_and_empty_places_are_marked():
    angles = torch.tensor([0, 60, 180]).double().deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    words, pool = word_numbers(["a b", "a c", "a b"], most=9), [[1, 2], [0, EMPTY], [0, 1]]
    meaning, surface = similarities(vectors, words, torch.tensor(pool), bins=4, chunk=2)
    assert meaning[[0, 0, 1, 2], [0, 1, 0, 0]].tolist() == pytest.approx([.5, 0, .5, 0], abs=1e-6)
    assert meaning[1, 1].isnan() and surface[[0, 0, 1], [0, 1, 0]].tolist() == [2, 3, 2]


# ---- inverse propensity ---------------------------------------------------------------------

MEANING_P, SURFACE_P = torch.tensor([[.95, .85, .80, .60]]), torch.tensor([[.9, .6, .3, .1]])
MEANING_N, SURFACE_N = torch.tensor([[.2, .4, .75, .3]]), torch.tensor([[.1, .4, .8, .8]])
E_P, E_N = torch.tensor([.1, .2, .3, .4]), torch.tensor([.6, .25, .1, .05])


def quarters(surface):
    return (4 * surface).long().clamp(max=3)


def test_the_weights_of_the_worked_example():
    relevance = MEANING_P.where(MEANING_P >= .7, 0)
    chance = inverse_propensity(relevance, quarters(SURFACE_P), E_P, least=.05)
    w = torch.tensor([.95 / .4, .85 / .3, .80 / .2, 0])           # 2.375, 2.833, 4; .60 is too low
    assert chance[0].tolist() == pytest.approx((w / w.sum()).tolist())
    assert chance[0].tolist() == pytest.approx([.257919, .307692, .434389, 0], abs=1e-6)
    assert (chance * SURFACE_P).sum().item() == pytest.approx(.547059, abs=1e-6)
    plain = inverse_propensity(relevance, quarters(SURFACE_P), torch.ones(4), least=.05)
    assert (plain * SURFACE_P).sum().item() == pytest.approx(.617308, abs=1e-6)
    relevance = (1 - MEANING_N).where(MEANING_N <= .6, 0)
    chance = inverse_propensity(relevance, quarters(SURFACE_N), E_N, least=.1)
    w = torch.tensor([.8 / .6, .6 / .25, 0, .7 / .1])             # the last e is clipped from .05
    assert chance[0].tolist() == pytest.approx((w / w.sum()).tolist())


def test_propensity_is_a_histogram_and_where_relevance_is_constant_all_bins_are_drawn_alike():
    pool, surface = torch.tensor([[1, EMPTY], [0, 1]]), torch.tensor([[0, 3], [1, 1]])
    assert propensity(pool, surface, 4).tolist() == [1 / 3, 2 / 3, 0, 0]
    bins = quarters(torch.tensor([[.05, .1, .2, .3, .35, .55, .6, .62, .7, .74, .8, .9, .92, .95,
                                   .96, 1.]]))
    e = propensity(torch.zeros_like(bins), bins, 4)
    assert e.tolist() == [.1875, .125, .3125, .375]
    chance = inverse_propensity(torch.ones(1, 16), bins, e, least=.01)[0]
    assert [chance[bins[0] == b].sum().item() for b in range(4)] == pytest.approx([.25] * 4)


def test_chances_sum_to_one_or_are_all_zero():
    torch.manual_seed(0)
    relevance = torch.rand(40, 6) * (torch.rand(40, 6) > .7)
    chance = inverse_propensity(relevance, torch.randint(0, 4, (40, 6)), E_P, least=.02)
    assert torch.equal(chance == 0, relevance == 0)
    assert chance.sum(1).tolist() == pytest.approx(relevance.any(1).double().tolist())
    assert not relevance.any(1).all()


def test_draws_follow_the_chances_with_a_share_for_the_other():
    pool, chance = torch.tensor([[10, 11, 12]] * 4000), torch.tensor([[.5, .5, 0]] * 4000)
    found = draw_weighted(pool, chance, torch.full((4000,), 99), 2, generator(), rate=.25)
    counts = Counter(found.flatten().tolist())
    assert found.shape == (4000, 2) and set(counts) == {10, 11, 99}
    assert [counts[n] / 8000 for n in (10, 11, 99)] == pytest.approx([.375, .375, .25], abs=.02)
    for rate, chance, expected in ((0, 1., 10), (1, 1., 99), (0, 0., 99)):   # no choice is left
        found = draw_weighted(torch.tensor([[10]] * 500), torch.full((500, 1), chance),
                              torch.full((500,), 99), 1, generator(), rate=rate)
        assert set(found.flatten().tolist()) == {expected}


# ---- all of it together ---------------------------------------------------------------------

def planted(n=300, changed=2, width=16):
    """Texts by chance, versions near their source, and pairs 2i, 2i + 1 that mean the same."""
    made, rng = generator(3), random.Random(0)
    x = torch.randn(n, width, generator=made)
    x[1::2] = x[::2] + .1 * torch.randn(n // 2, width, generator=made)
    vectors = torch.cat([x] + [x + .05 * torch.randn(n, width, generator=made)
                               for _ in range(changed)])
    texts = [" ".join(rng.choices([f"w{i}" for i in range(400)], k=8)) for _ in range(n)]
    versions = texts + [text + " more" for text in texts] * changed
    return corpus_of(texts), vectors.half(), word_numbers(versions, most=9)


def test_positives_mean_the_same_and_negatives_do_not():
    corpus, vectors, words = planted()
    positives, negatives, limit = debiased_pairs(corpus, vectors, words, Config(epochs=3, seed=1))
    assert positives.shape == negatives.shape == (3, 300)
    x = vectors.float()
    for positive, negative in zip(positives, negatives):
        assert torch.cosine_similarity(x[:300], x[positive]).min() > .8
        assert torch.cosine_similarity(x[:300], x[negative]).max() <= limit + 1e-3 and limit < .6
    itself = (positives == torch.arange(300)).float().mean().item()
    assert itself == pytest.approx(.25, abs=.05)


def test_what_the_rules_propose_most_is_drawn_less_often_than_without_correction():
    """8 of 10 candidates are neighbours that share hardly a word, 2 are versions that share 8."""
    share = {}
    for bins in (1, 10):
        config = Config(propensity_bins=bins, own_rate=0., epochs=20, seed=1)
        share[bins] = (debiased_pairs(*planted(), config)[0] < 300).float().mean().item()
    assert share[10] < .6 * share[1]


def test_pairs_are_a_function_of_the_seed():
    a, b, c = (debiased_pairs(*planted(60), Config(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])


def test_the_smallest_corpus_has_pairs_too():
    vectors, texts = torch.randn(6, 4, generator=generator()), ["a b", "c d"]
    _, negatives, _ = debiased_pairs(corpus_of(texts), vectors, word_numbers(texts * 3, most=9),
                                     Config(own_rate=0.))
    assert negatives.tolist() == [[1, 0]]


# ---- settings and runs ----------------------------------------------------------------------

@pytest.mark.parametrize("model_type, width, expected", [
    ("bert", 768, (64, 3e-5)), ("roberta", 768, (128, 1e-5)), ("bert", 256, (128, 1e-4))])
def test_the_defaults_go_by_the_encoders_size(model_type, width, expected):
    config = resolved("debcse", model_type, width)
    assert (config.batch_size, config.learning_rate) == expected
    assert (config.own_rate, config.propensity_bins, config.epochs) == (.25, 10, 1)


@pytest.mark.parametrize("settings, said", [
    (dict(positives="crop"), "--method debcse has positives of its own, found --positives crop"),
    (dict(teacher="mine.npy"), "--teacher mine.npy has vectors of the corpus only")])
def test_what_makes_no_sense_is_refused(settings, said):
    config = Config(method="debcse", batch_size=2, **settings)
    with pytest.raises(ValueError, match=said):
        papers.check(config, [corpus_of(TEXTS)], SHAPE)
    papers.check(Config(method="debcse", batch_size=2, hard_negative_weight=.5),
                 [corpus_of(TEXTS)], SHAPE)                       # it has hard negatives of its own


def test_a_run_asks_its_teacher_and_leaves_it_as_it_was(program, tiny, sentences, tmp_path, capsys,
                                                        monkeypatch):
    teacher, kept, prepare = tmp_path / "teacher", [], DebCSE.prepare
    shutil.copytree(tiny, teacher)
    before = (teacher / "model.safetensors").read_bytes()
    monkeypatch.setattr(DebCSE, "prepare", lambda built, encode: (kept.append(built),
                                                                  prepare(built, encode)))
    folder = program(method="debcse", steps=2, teacher=teacher)
    assert "WARNING" not in capsys.readouterr().err
    assert (teacher / "model.safetensors").read_bytes() == before
    texts = read_corpus(str(sentences)).columns[0]
    expected = encode(load(teacher), Tokenizer.read(teacher), texts, max_tokens=32)
    assert torch.allclose(kept[0].of_sentences.float().cpu(), expected, atol=1e-2)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and 0 <= last["false_negatives"] <= 1

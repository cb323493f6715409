"""InfoCSE: documents, thresholds, clusters and mates by known answers; rounds as they are run."""

import json
import math
import random
import threading
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import mincse
from config import Config, resolve, validate
from losses import info_nce
from corpus_methods import InfoCSE
from methods import Encoded, SimCSE
from model import Encoder, EncoderConfig, SentenceEncoder
from positives import (adjusted_rand, annotate, average_linkage, can_be_mate, find_documents,
                       is_title, jaccard, mate_table, similarity_threshold, text_numbers)


def u(*degrees):
    """Unit vectors at these angles: their cosines can be worked out in the head."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def cosines(*degrees):
    return (u(*degrees) @ u(*degrees).mT).numpy()


def groups(labels):
    """[0, 0, 2] -> {{0, 1}, {2}}"""
    members = {}
    for place, label in enumerate(labels):
        members.setdefault(int(label), set()).add(place)
    return {frozenset(group) for group in members.values()}


def partition(*parts):
    return {frozenset(part) for part in parts}


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def line(*marks):
    """A sentence of seven words that shares none with a line of other marks."""
    return " ".join(f"{letter}{'-'.join(map(str, marks))}" for letter in LETTERS[:7]) + "."


def by_angle(angles):
    """An encoder that knows the angle of each sentence."""
    return lambda lines: u(*(angles[text] for text in lines))


# ---- documents ------------------------------------------------------------------------------

def test_a_title_is_short_and_has_no_mark_of_an_end():
    assert is_title("History of the Netherlands") and not is_title("It rains.")
    assert not is_title('He said "no"') and not is_title("a b c d e f g h i")


def test_titles_fragments_and_very_long_lines_get_no_mates():
    assert can_be_mate("This line has exactly six words.") and can_be_mate(" ".join("a" * 64))
    for words in ("Only five words are here.", "A title line of six words", "a " * 65):
        assert not can_be_mate(words)


def test_blank_lines_make_documents_and_titles_do_where_there_are_none():
    lines = ["First", line(1), line(2), "Second", line(3)]
    assert find_documents(lines, [0, 0, 0, 0, 1]) == [range(0, 4), range(4, 5)]
    assert find_documents(lines, None) == [range(0, 3), range(3, 5)]


def test_a_long_document_is_cut_after_64_lines_and_every_row_is_in_one_part():
    lines = ["Title"] + [line(i) for i in range(150)] + ["Next", line(151)]
    parts = find_documents(lines, None)
    assert [len(part) for part in parts] == [64, 64, 23, 2]
    assert [row for part in parts for row in part] == list(range(153))
    assert [len(part) for part in find_documents(lines, [0] * 153)] == [64, 64, 25]


def test_a_shuffled_corpus_is_refused_since_it_has_hardly_any_titles():
    lines = [line(i) for i in range(995)]
    assert find_documents(lines + ["Title"] * 5, None)
    with pytest.raises(ValueError, match="0 titles in 995 lines, so they seem shuffled.*another"):
        find_documents(lines, None)
    with pytest.raises(ValueError, match="4 titles in 999 lines"):
        find_documents(lines + ["Title"] * 4, None)


# ---- clusters -------------------------------------------------------------------------------

@pytest.mark.parametrize("least, expected", [
    (.99, [{0}, {1}, {2}, {3}]), (.95, [{0}, {1}, {2, 3}]), (.80, [{0, 1}, {2, 3}]),
    (.05, [{0, 1, 2, 3}])])
def test_the_most_alike_are_merged_first(least, expected):
    """Merges at 0.984808, 0.939693 and, of the two pairs, 0.085505."""
    found = groups(average_linkage(cosines(0, 20, 90, 100), least=least))
    assert found == partition(*expected)


@pytest.mark.parametrize("edge, size", [(.984808, 2), (.939693, 1), (.085505, 0)])
def test_a_merge_happens_up_to_its_own_likeness_and_not_above(edge, size):
    """Below each edge there is one cluster fewer than above it."""
    above, below = (len(set(average_linkage(cosines(0, 20, 90, 100), least=edge + change)))
                    for change in (1e-5, -1e-5))
    assert above == below + 1 == size + 2


def test_linkage_is_the_average_and_neither_the_nearest_nor_the_farthest():
    """The third merge is at 0.879422, the mean of 0.939693 and 0.819152."""
    likeness = cosines(0, 20, 35, 90, 100)
    whole, split = partition({0, 1, 2}, {3, 4}), partition({0}, {1, 2}, {3, 4})
    assert groups(average_linkage(likeness, least=.80)) == whole
    assert groups(average_linkage(likeness, least=.8794)) == whole
    assert groups(average_linkage(likeness, least=.8795)) == split
    assert groups(average_linkage(likeness, least=.80, largest=2)) == split


def test_of_equal_pairs_the_first_in_reading_order_is_merged_first():
    likeness = np.full((4, 4), .9)
    assert groups(average_linkage(likeness, least=.5, largest=2)) == partition({0, 1}, {2, 3})
    assert average_linkage(likeness, least=.5, largest=3).tolist() == [0, 0, 0, 3]


def slow_linkage(likeness, least, largest):
    """Means over all members, computed anew at every step."""
    clusters = [[i] for i in range(len(likeness))]
    while True:
        best = max(((np.mean([likeness[i, j] for i in a for j in b]), a, b)
                    for a, b in combinations(clusters, 2) if len(a) + len(b) <= largest),
                   default=(-1, None, None), key=lambda found: found[0])
        if best[0] < least:
            return {frozenset(cluster) for cluster in clusters}
        clusters = [c for c in clusters if c not in best[1:]] + [best[1] + best[2]]


@pytest.mark.parametrize("seed", range(5))
def test_clusters_equal_those_of_means_over_all_members(seed):
    x = F.normalize(torch.randn(13, 3, generator=torch.Generator().manual_seed(seed)).double())
    likeness = (x @ x.mT).numpy()
    for least in (.9, .6, .2):
        for largest in (2, 5, 13):
            found = groups(average_linkage(likeness, least=least, largest=largest))
            assert found == slow_linkage(likeness, least, largest)


@pytest.mark.parametrize("largest", [4, 8])
def test_clusters_only_grow_as_the_threshold_falls(largest):
    x = F.normalize(torch.randn(17, 3, generator=torch.Generator().manual_seed(3)).double())
    finer = groups(range(17))
    for least in (.95, .8, .6, .4, .2, 0.):
        coarser = groups(average_linkage((x @ x.mT).numpy(), least=least, largest=largest))
        assert all(any(part <= whole for whole in coarser) for part in finer)
        finer = coarser


def test_the_order_of_sentences_changes_nothing_but_their_numbers():
    likeness = cosines(0, 20, 35, 90, 100)
    usual = groups(average_linkage(likeness, least=.8))
    for order in permutations(range(5)):
        moved = average_linkage(likeness[np.ix_(order, order)], least=.8)
        assert {frozenset(order[place] for place in group) for group in groups(moved)} == usual


def test_one_line_or_none_is_no_cluster_of_several():
    assert average_linkage(np.ones((1, 1)), least=.5).tolist() == [0]
    assert average_linkage(np.ones((0, 0)), least=.5).tolist() == []


# ---- threshold ------------------------------------------------------------------------------

WITHIN = np.concatenate([s[np.triu_indices(len(s), 1)]
                         for s in (cosines(0, 20, 90, 100), cosines(10, 200))])


def test_the_quantile_of_cosines_inside_documents_is_interpolated():
    assert len(WITHIN) == 7
    found = similarity_threshold(WITHIN, np.zeros(3), quantile=.7)
    assert found == pytest.approx(.461555, abs=1e-6)


def test_sentences_of_different_documents_set_a_floor():
    across = np.array([.5, .7])                                   # population deviation .1
    assert similarity_threshold(WITHIN, across, quantile=.7) == pytest.approx(.6 + .3)
    assert similarity_threshold(WITHIN, across, quantile=1.) == pytest.approx(.95)   # at most
    assert similarity_threshold(WITHIN, np.array([-.9]), quantile=0.) == 0           # at least


def test_without_anything_to_compare_hardly_anything_is_alike():
    assert similarity_threshold(np.empty(0), np.empty(0), quantile=.9) == .95


# ---- annotation -----------------------------------------------------------------------------

DOCUMENTS = [range(0, 4), range(4, 6)]
LINES = [line(i) for i in range(6)]
ANGLES = dict(zip(LINES, (0, 20, 90, 100, 10, 200)))


def annotated(angles=ANGLES, lines=LINES, documents=DOCUMENTS, quantile=.7, **settings):
    return annotate(lines, documents, by_angle(angles), quantile=quantile, **settings)


def test_no_mates_across_documents_even_if_a_foreign_sentence_is_the_nearest(monkeypatch):
    """Line 4, at 10 degrees, lies between lines 0 and 1 of the other document."""
    monkeypatch.setattr("positives.similarity_threshold", lambda *_, quantile: .8)
    found = annotated()
    assert groups(found.cluster.values()) == partition({0, 1}, {2, 3}, {4}, {5})
    assert [pair[:2] for pair in found.pairs] == [(0, 1), (2, 3)]
    assert [pair[2] for pair in found.pairs] == pytest.approx([.939693, .984808], abs=1e-6)


def test_weak_members_of_a_cluster_are_no_mates(monkeypatch):
    """Between 0 and 35 degrees the cosine is 0.819152, though both belong to the cluster."""
    monkeypatch.setattr("positives.similarity_threshold", lambda *_, quantile: .85)
    lines = [line(i) for i in range(5)]
    found = annotated(dict(zip(lines, (0, 20, 35, 90, 270))), lines, [range(5)])
    assert groups(found.cluster.values()) == partition({0, 1, 2}, {3}, {4})
    assert [pair[:2] for pair in found.pairs] == [(0, 1), (1, 2)]


def test_equal_and_nearly_equal_texts_are_trivial_and_no_mates(monkeypatch):
    monkeypatch.setattr("positives.similarity_threshold", lambda *_, quantile: .5)
    lines = ["One two three four five six.", "one  TWO three four five six.",
             "one two three four five six. seven.", "a b c d e f."]
    found = annotated(dict.fromkeys(lines, 0), lines, [range(4)])
    assert [pair[:2] for pair in found.pairs] == [(0, 3), (1, 3), (2, 3)]
    assert jaccard(lines[0], lines[1]) == 1 and jaccard(lines[0], lines[2]) == pytest.approx(6 / 7)
    assert set(found.cluster.values()) == {0}                     # still no negatives of each other


def test_lines_that_cannot_be_mates_stay_alone_and_count_for_the_coverage(monkeypatch):
    monkeypatch.setattr("positives.similarity_threshold", lambda *_, quantile: .5)
    lines = [line(1), "A title", line(2), "Short.", line(3)]
    found = annotate(lines, [range(5)], by_angle({line(1): 0, line(2): 100, line(3): 9}),
                     quantile=.9)
    assert found.cluster == {0: 0, 1: 1, 2: 2, 3: 3, 4: 0}
    assert [pair[:2] for pair in found.pairs] == [(0, 4)] and found.coverage == 2 / 5


def random_documents(seed, documents=20, size=7, width=33):
    """Lines, documents and an encoder: each document has two topics, in turns, and much noise."""
    lines = [line(seed, i) for i in range(documents * size)]
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(documents, 1, 2, width, generator=generator).expand(-1, size, -1, -1)
    x = topics.flatten(0, 1)[range(len(lines)), [i % 2 for i in range(len(lines))]]
    x = x + .8 * torch.randn(len(lines), width, generator=generator)
    row = {text: i for i, text in enumerate(lines)}
    return (lines, [range(i, i + size) for i in range(0, len(lines), size)],
            lambda texts: x[[row[text] for text in texts]])


@pytest.mark.parametrize("seed", range(3))
def test_mates_are_of_one_document_and_cluster_and_nobody_is_their_own(seed):
    lines, documents, encode = random_documents(seed)
    found = annotate(lines, documents, encode, quantile=.8)
    assert found.pairs
    for i, j, cosine, overlap in found.pairs:
        assert i < j and i // 7 == j // 7 and found.cluster[i] == found.cluster[j]
        assert cosine >= found.threshold and overlap < .8
    table, chance = mate_table(found.pairs, list(range(140)), width=7)
    of = [{int(j) for j, p in zip(*row) if p} for row in zip(table, chance)]
    assert all(i in of[j] for i in range(140) for j in of[i])
    assert all(i not in of[i] for i in range(140))


def test_a_higher_quantile_never_covers_more():
    lines, documents, encode = random_documents(0)
    covered = [annotate(lines, documents, encode, quantile=q).coverage
               for q in (.8, .85, .9, .95, 1.)]
    assert covered == sorted(covered, reverse=True) and covered[0] > covered[-1]


def test_where_most_find_a_mate_the_quantile_is_raised_once(monkeypatch):
    asked = []

    def lenient(within, across, *, quantile):
        asked.append(quantile)
        return .1
    monkeypatch.setattr("positives.similarity_threshold", lenient)
    annotated(dict(zip(LINES, (0, 1, 2, 3, 4, 5))), quantile=.9)
    annotated(dict(zip(LINES, (0, 1, 180, 90, 0, 180))), quantile=.9)
    assert asked == pytest.approx([.9, .93, .9])


def test_the_figures_of_an_annotation_are_means_over_clusters_and_pairs(monkeypatch):
    monkeypatch.setattr("positives.similarity_threshold", lambda *_, quantile: .85)
    lines = [line(i) for i in range(4)] + [line(3).replace("a3", "other").replace("b3", "words")]
    found = annotated(dict(zip(lines, (0, 20, 35, 90, 80))), lines, [range(5)])
    share = 5 / 9                                                 # of the words of lines 3 and 4
    assert found.figures() == pytest.approx(
        [.85, 1., 2.5, (.939693 + .965926 + .984808) / 3, share / 3], abs=1e-6)


def test_without_mates_the_means_are_not_known():
    assert [math.isnan(x) for x in annotated(dict.fromkeys(LINES, 0) | {LINES[0]: 0}, [
        "Short."] * 6).figures()] == [False, False, True, True, True]


def test_an_empty_line_up_of_candidates_is_annotated_too():
    found = annotate(["Short.", "Also."], [range(2)], lambda texts: torch.empty(0, 2), quantile=.9)
    assert found.cluster == {0: 0, 1: 1} and found.coverage == 0


# ---- drawing mates --------------------------------------------------------------------------

def test_nearer_mates_are_drawn_more_often():
    """z_i at 0 degrees, mates at 20 and 40, τ 0.1."""
    pairs = [(0, 1, math.cos(math.radians(20)), 0.), (0, 2, math.cos(math.radians(40)), 0.)]
    table, chance = mate_table(pairs, [0, 1, 2, 3], width=3, temperature=.1)
    assert table[0].tolist() == [1, 2, 0]
    assert chance[0].tolist() == pytest.approx([.850240, .149760, 0], abs=1e-6)
    assert chance[1].tolist() == chance[2].tolist() == [1, 0, 0] and not chance[3].any()
    assert table[1, 0] == table[2, 0] == 0


@dataclass(frozen=True)
class Texts:
    """As much of a corpus as the method looks at."""
    columns: list[list[str]]
    documents: list[int] | None

    def __len__(self):
        return len(self.columns[0])


CORPUS = Texts([LINES], [0, 0, 0, 0, 1, 1])


def method(kind=InfoCSE, corpus=CORPUS, **settings):
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 3, 1, 1, 5)), pooling="cls")
    config = replace(Config(method="infocse", batch_size=2, annotation_quantile=.7), **settings)
    return kind(corpus, config, model=model)


def known_mates(built):
    """Lines 0 and 1 are mates, and 2 has both 0 and 3."""
    built.mates[:4] = torch.tensor([[1, 0], [0, 0], [0, 3], [2, 0]])
    built.chance[:4] = torch.tensor([[1, 0], [1, 0], [.85, .15], [1, 0.]])
    return built


def test_half_of_the_time_the_positive_is_a_mate_drawn_by_its_chance():
    built, rng = known_mates(method(largest_cluster=3)), random.Random(0)
    drawn = Counter(built.views([2], rng)[1][0] for _ in range(4000))
    shares = [drawn[LINES[row]] / 4000 for row in (2, 0, 3)]
    assert shares == pytest.approx([.5, .425, .075], abs=.03) and sum(drawn.values()) == 4000


def test_the_anchor_is_never_changed_and_who_has_no_mate_is_their_own_positive():
    built = known_mates(method(largest_cluster=3, twin_rate=0.))
    assert built.views([0, 4, 1], random.Random(0)) == [
        [LINES[0], LINES[4], LINES[1]], [LINES[1], LINES[4], LINES[0]]]


def test_with_twin_rate_one_the_texts_are_those_of_simcse():
    built = known_mates(method(largest_cluster=3, twin_rate=1.))
    for rng in map(random.Random, range(20)):
        assert built.views([0, 1, 2], rng) == [LINES[:3]] * 2


def test_before_the_first_annotation_the_texts_are_those_of_simcse_whatever_the_view():
    for view in ("dropout", "delete-words"):
        ours, plain = (method(kind, positives=view).views([0, 3, 5], random.Random(7))
                       for kind in (InfoCSE, SimCSE))
        assert ours == plain


# ---- the loss -------------------------------------------------------------------------------

def masked(anchor, positive, cluster, temperature=.05):
    built = method(temperature=temperature)
    rows = torch.arange(len(anchor))
    built.cluster[rows] = torch.tensor(cluster)
    return built.loss(Encoded([anchor, positive], 1, 9, rows))


def test_sentences_of_a_cluster_are_no_negatives_of_each_other():
    anchor, positive = u(0, 20, 10), u(20, 0, 10)
    assert masked(anchor, positive, [7, 7, 9]).item() == pytest.approx(1.130736, abs=1e-6)
    assert masked(anchor, positive, [7, 8, 9]).item() == pytest.approx(1.580731, abs=1e-6)
    each = [1.242791, 1.242791, .906624]
    for i, expected in enumerate(each):                           # by hand, anchor by anchor
        s = [math.cos(math.radians(x)) / .05 for x in ([20, 10], [20, 10], [10, 10])[i]]
        own = [math.cos(math.radians(x)) / .05 for x in (20, 20, 0)][i]
        others = [math.exp(x) for x in (s[1:] if i < 2 else s)]
        assert math.log(math.exp(own) + sum(others)) - own == pytest.approx(expected, abs=1e-6)


def test_equal_texts_are_no_negatives_of_each_other():
    corpus = Texts([[line(1), line(2), line(1).upper(), line(3)]], [0, 0, 1, 1])
    assert text_numbers(corpus.columns[0]).tolist() == [0, 1, 0, 2]
    torch.manual_seed(0)
    anchor, positive = torch.randn(2, 4, 3).double()
    weight = torch.ones(4, 4).double()
    weight[0, 2] = weight[2, 0] = 0
    found = method(corpus=corpus).loss(Encoded([anchor, positive], 1, 9, torch.arange(4)))
    assert found == info_nce(anchor, positive, weight=weight)


def test_where_nobody_has_a_mate_the_loss_is_that_of_simcse_bit_for_bit():
    torch.manual_seed(0)
    out = Encoded(list(torch.randn(2, 6, 3)), 1, 9, torch.arange(6))
    assert torch.equal(method().loss(out), method(SimCSE).loss(out))


def test_no_gradient_reaches_what_is_masked_and_everybody_keeps_their_own_positive():
    anchor, positive = u(0, 20, 10), u(20, 0, 10).requires_grad_()
    masked(anchor, positive, [7, 7, 7]).backward()                # nobody has a negative
    assert positive.grad.abs().max() < 1e-12
    positive = u(20, 0, 10).requires_grad_()
    loss = masked(anchor, positive, [7, 7, 9])
    loss.backward()
    assert loss.isfinite() and positive.grad.isfinite().all()

    def of_anchor(i):
        p = u(20, 0, 10).requires_grad_()
        same = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1.]]).double()
        s = F.cosine_similarity(anchor[i], p) / .05 + same[i].log()
        (s.logsumexp(0) - s[i]).backward()
        return p.grad
    assert not of_anchor(0)[1].any() and not of_anchor(1)[0].any()
    total = sum(of_anchor(i) for i in range(3)) / 3
    assert torch.allclose(positive.grad, total, atol=1e-12)


# ---- rounds ---------------------------------------------------------------------------------

def many_documents(documents=40, size=10):
    lines = [line(i) for i in range(documents * size)]
    return Texts([lines], [i // size for i in range(len(lines))])


def test_rounds_are_equal_parts_in_which_documents_stay_together():
    built = method(corpus=many_documents(), batch_size=5)
    rounds = built.rounds(80)                                     # one pass: 400 rows
    assert [(count, len(rows)) for count, rows in rounds] == [(20, 100)] * 4
    assert sorted(row for _, rows in rounds for row in rows) == list(range(400))
    assert all(len({row // 10 for row in rows}) == 10 for _, rows in rounds)
    assert rounds == built.rounds(80) != method(corpus=many_documents(), batch_size=5,
                                                seed=1).rounds(80)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 133])
def test_rounds_fill_any_number_of_steps_and_no_row_comes_twice_before_all_came(steps):
    built = method(corpus=many_documents(), batch_size=7)
    rounds = built.rounds(steps)
    assert len(rounds) == min(4, steps) and sum(count for count, _ in rounds) == steps
    assert all(len(rows) == 7 * count > 0 for count, rows in rounds)
    times = Counter(row for _, rows in rounds for row in rows)
    assert max(times.values()) - min([*times.values(), *[0] * (len(times) < 400)]) <= 1


def test_a_step_trains_on_rows_of_its_own_round():
    built = method(corpus=many_documents(), batch_size=5)
    order = list(mincse.row_order(built, built.config, 80))
    assert len(order) == 80
    for number, (_, rows) in enumerate(built.rounds(80)):
        taken = order[20 * number : 20 * number + 20]
        assert sorted(sum(taken, [])) == sorted(rows) and sum(taken, []) != list(rows)


def test_other_methods_have_one_round_and_the_order_they_always_had():
    built = method(SimCSE, corpus=many_documents(), batch_size=7)
    found = list(mincse.row_order(built, built.config, 100))
    assert found == list(data.batches(400, 7, seed=42, epochs=2))[:100]


def refreshed(seed=0, quantile=.8, **settings):
    lines, documents, encode = random_documents(seed, documents=30)
    corpus = Texts([lines], [i // 7 for i in range(210)])
    built = method(corpus=corpus, annotation_quantile=quantile, **settings)
    return built, encode


def test_a_round_annotates_its_own_documents_whole_and_leaves_the_others_alone():
    built, encode = refreshed()
    rows = list(range(14, 70)) + [80]                             # documents 2 to 9, and one of 11
    built.refresh(encode, rows)
    changed = {row // 7 for row in built.chance.any(dim=1).nonzero()[:, 0].tolist()}
    assert changed <= set(range(2, 10)) | {11} | set(built.probe) and len(changed) > 4
    again = annotate(built.corpus.columns[0], [range(7 * n, 7 * n + 7) for n in sorted(
        {*range(2, 10), 11, *built.probe})], encode, quantile=.8, seed=42)
    assert all(built.cluster[row] == again.cluster[row] for row in again.cluster)
    assert built.logs()["coverage"] == pytest.approx(again.coverage)


def test_with_hardly_any_mates_the_round_is_simcse_and_says_so():
    built, encode = refreshed(quantile=.999)
    with pytest.warns(UserWarning, match="infocse: only .* lower --annotation-quantile"):
        built.refresh(encode, range(210))
    assert torch.equal(built.cluster, torch.arange(210)) and not built.chance.any()
    assert built.logs()["coverage"] == pytest.approx(2 / 210)     # one pair, of no use


def test_agreement_compares_the_probe_with_the_round_before():
    built, encode = refreshed()
    other = random_documents(0, documents=30)[2]
    built.refresh(encode, range(100))
    assert "agreement" not in built.logs()
    built.refresh(encode, range(100))
    assert built.logs()["agreement"] == 1
    built.refresh(lambda texts: other(texts) * torch.arange(33), range(100))
    assert built.logs()["agreement"] < .9


def test_the_frozen_annotator_looks_once_and_at_everything():
    built, encode = refreshed(annotator="frozen")
    seen = []
    built.refresh(lambda texts: seen.append(len(texts)) or encode(texts), range(14))
    built.refresh(lambda texts: 1 / 0, range(14, 100))
    assert seen == [210] and built.annotations == 1


def test_what_a_round_found_is_saved_with_the_run():
    built, encode = refreshed()
    built.refresh(encode, range(210))
    again, _ = refreshed()
    again.load_state_dict(built.state_dict())
    assert again.logs() == built.logs() and again.logs()["coverage"] > 0
    rngs = random.Random(3), random.Random(3)
    assert built.views(list(range(210)), rngs[0]) == again.views(list(range(210)), rngs[1])
    assert torch.equal(built.cluster, again.cluster)


def test_the_index_of_rand_is_one_for_equal_and_about_zero_for_unrelated_clusters():
    """Hubert & Arabie's contingency table, by its definition over all pairs."""
    torch.manual_seed(0)
    a, b = torch.randint(5, (60,)), torch.randint(4, (60,))
    assert adjusted_rand(a, (a + 3) * 7) == 1 and abs(adjusted_rand(a, b)) < .1
    assert adjusted_rand(torch.arange(5), torch.arange(5)) == 1
    together = [(a[i] == a[j], b[i] == b[j]) for i, j in combinations(range(60), 2)]
    both, in_a, in_b = (sum(bool(x and y) for x, y in together), sum(bool(x) for x, _ in together),
                        sum(bool(y) for _, y in together))
    chance = in_a * in_b / len(together)
    expected = (both - chance) / ((in_a + in_b) / 2 - chance)
    assert adjusted_rand(a, b) == pytest.approx(expected)


# ---- with an encoder ------------------------------------------------------------------------

@pytest.fixture
def articles(tmp_path):
    """40 documents of 8 sentences, two topics in each."""
    path = tmp_path / "articles.txt"
    does = ["runs home with all of us", "sees the long road to town", "eats bread and some butter",
            "reads many books in the evening"]
    path.write_text("\n".join("".join(f"the {who} number {i} {what}.\n" for who in ("dog", "owl")
                                      for what in does) for i in range(40)))
    return path


@pytest.fixture
def train(program, articles):
    return partial(program, method="infocse", corpus=articles, steps=16)


def metrics(folder):
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("sentences_per_second", "loss")}
            for row in rows]


@pytest.fixture
def job(tiny, articles, pairs):
    """What `mincse.fit` trains, and its encoder."""
    inputs = mincse.read_inputs({"method": "infocse", "encoder": str(tiny), "test": str(pairs),
                                 "corpus": str(articles), "batch_size": 8, "steps": 16})
    return mincse.build(inputs, inputs.config)


def test_annotating_changes_neither_the_encoder_nor_any_random_state(job):
    model, built = job.model.train(), job.parts["method"]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = [annotate(job.inputs.corpus.columns[0], built.documents, job.encode, quantile=.9)
             for _ in range(2)]
    assert found[0] == found[1] and found[0].pairs
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_no_batch_of_a_round_is_made_before_its_annotation(job):
    """Batches are made early in another thread, yet each sees what `refresh` of its round left."""
    built, steps = job.parts["method"], []
    views, refresh = built.views, built.refresh
    built.views = lambda rows, rng: steps.append(
        (int(built.annotations), threading.current_thread().name)) or views(rows, rng)
    built.refresh = lambda encode, rows: steps.append("refresh") or refresh(encode, rows)
    assert len(list(mincse.batches_by_round(job, first=1))) == 16
    threads = [step[1] for step in steps if step != "refresh"]
    assert threading.current_thread().name not in threads
    assert [step if step == "refresh" else step[0] for step in steps] == [
        *[0] * 4, "refresh", *[1] * 4, "refresh", *[2] * 4, "refresh", *[3] * 4]


@pytest.mark.parametrize("first, refreshed", [(1, 3), (4, 3), (5, 3), (6, 2), (13, 1), (14, 0)])
def test_a_run_that_goes_on_annotates_only_what_lies_ahead(job, first, refreshed):
    built, calls = job.parts["method"], []
    built.refresh = lambda encode, rows: calls.append(rows)
    ahead = list(mincse.batches_by_round(job, first=first))
    whole = list(mincse.make_batches(built, job.inputs.tokenizer, job.config, steps=16, first=1))
    assert len(calls) == refreshed
    assert [b.rows.tolist() for b in ahead] == [b.rows.tolist() for b in whole[first - 1 :]]


@pytest.mark.parametrize("step", [2, 4, 5, 8, 11, 12], ids="after step {}".format)
def test_a_run_stopped_inside_or_between_rounds_goes_on_exactly(train, stopped, capsys, pairs,
                                                                step):
    flags = {"dev": pairs, "dev_every": 3, "learning_rate": 1e-3}
    whole = train(out="whole", **flags)
    stopped(step, train, out="parts", **flags)
    assert f"stopped at step {step} of 16" in capsys.readouterr().err
    parts = train("--resume", out="parts", **flags)
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(whole) == metrics(parts)
    assert metrics(whole)[-1]["coverage"] > .1                    # there was something to lose


def test_a_run_annotates_after_the_first_quarter_and_logs_what_it_found(train, pairs):
    lines = metrics(train(dev=pairs, dev_every=4))
    assert [line["step"] for line in lines] == [4, 8, 10, 12, 16]
    names = {"threshold", "coverage", "mean_cluster_size", "mate_cosine", "mate_jaccard"}
    assert not names & lines[0].keys() and all(names <= line.keys() for line in lines[1:])
    assert ["agreement" in line for line in lines] == [False, False, True, True, True]
    assert lines[-1]["coverage"] > 0


@pytest.mark.parametrize("flags", [
    {"annotator": "frozen"}, {"loss": "focal"}, {"positives": "crop"}, {"pooling": "mean"},
    {"annotation_rounds": 1, "largest_cluster": 2, "twin_rate": 0}, {"steps": 2}, {"steps": 90}],
    ids=str)
def test_it_combines_with_the_other_menus_and_any_number_of_steps(train, flags):
    assert metrics(train(**flags))[-1]["step"] == flags.get("steps", 16)


def test_without_documents_it_is_refused_before_anything_is_written(
        train, sentences, tmp_path, capsys):
    for flag in ((), ("--dry-run",)):
        with pytest.raises(SystemExit) as refused:
            train(*flag, corpus=sentences)
        said = capsys.readouterr().err
        assert refused.value.code == 3 and "found 0 titles in 64 lines" in said
        assert not (tmp_path / "run").exists()


def test_pairs_are_refused_since_they_have_positives(train, tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("".join(f"dog {i},animal {i}\n" for i in range(16)))
    with pytest.raises(SystemExit) as refused:
        train(corpus=path)
    assert refused.value.code == 2 and "--method infocse takes a corpus of 1" in (
        capsys.readouterr().err)


def test_a_dry_run_takes_its_three_steps(train, capsys):
    train("--dry-run")
    assert "steps: 16 of 8 rows" in capsys.readouterr().out


@pytest.mark.parametrize("width, batch, quantile", [(256, 128, .95), (768, 64, .9)])
def test_a_small_encoder_has_a_stricter_quantile(width, batch, quantile):
    config = resolve({"method": "infocse"}, model_type="bert", width=width, columns=1)
    assert (config.batch_size, config.annotation_quantile) == (batch, quantile)
    assert (config.annotation_rounds, config.largest_cluster, config.twin_rate,
            config.mate_temperature) == (3, 8, .5, .1)


@pytest.mark.parametrize("name, value", [
    ("annotation_rounds", 0), ("annotation_quantile", 1.), ("largest_cluster", 1),
    ("twin_rate", 1.1), ("mate_temperature", 0.)])
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        validate(replace(Config(method="infocse"), **{name: value}))
    validate(Config(method="infocse", twin_rate=1.))


# ---- mutual reinforcement -------------------------------------------------------------------

def annotations_of_a_toy(seed, *, documents=40, width=64):
    """(pairs, share of the same topic) of rounds 1 and 2: noisy features, a linear encoder."""
    torch.manual_seed(seed)
    topic = torch.arange(2 * documents).repeat_interleave(5)      # two in a document
    signal = torch.randn(2 * documents, width) * (torch.arange(width) < width // 2)
    noise = torch.randn(len(topic), width) * (.5 + .5 * (torch.arange(width) >= width // 2))
    lines, x = [line(i) for i in range(len(topic))], signal[topic] + noise
    corpus = Texts([lines], [i // 10 for i in range(len(lines))])
    built = method(corpus=corpus, annotation_quantile=.8, seed=seed)
    encoder = torch.nn.Linear(width, width // 2, bias=False)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    row, annotations = {text: i for i, text in enumerate(lines)}, []

    def features(texts):
        return x[[row[text] for text in texts]]

    def encode(texts):
        return encoder(features(texts)).detach()

    for number in range(3):
        if number:
            built.refresh(encode, range(len(lines)))
            pairs = annotate(lines, built.documents, encode, quantile=.8).pairs
            same = [bool(topic[i] == topic[j]) for i, j, *_ in pairs]
            annotations.append((len(pairs), sum(same) / len(same)))
        for step, rows in enumerate(data.batches(len(lines), 40, seed=number, epochs=4)):
            columns = [encoder(F.dropout(features(texts), .2))
                       for texts in built.views(rows, random.Random(step))]
            loss = built.loss(Encoded(columns, 1, 9, torch.tensor(rows)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return annotations


def test_a_better_encoder_finds_more_mates_and_purer_ones_round_after_round():
    toys = [annotations_of_a_toy(seed) for seed in range(5)]
    assert sum(second[1] >= first[1] for first, second in toys) >= 4, toys
    assert all(second[0] > first[0] for first, second in toys), toys

"""InfoCSE: documents, thresholds, clusters and pairs by known answers; rounds as they are run."""

import json
import math
import random
import threading
from collections import Counter
from functools import partial
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import mincse
from conftest import at, resolved
from engine.flags import check_ranges
from losses import info_nce
from model import Encoder, EncoderConfig, SentenceEncoder
from papers import infocse
from papers.infocse import (Config, InfoCSE, adjusted_rand, annotate, average_linkage,
                            can_be_paired, find_documents, is_title, pair_table,
                            similarity_threshold)
from papers.simcse import Encoded, SimCSE


def cosines(*degrees):
    return (at(*degrees) @ at(*degrees).mT).numpy()


def groups(labels):
    """[0, 0, 2] -> {{0, 1}, {2}}"""
    return {frozenset(i for i, x in enumerate(labels) if x == label) for label in labels}


def partition(*members):
    return {frozenset(group) for group in members}


def line(*marks):
    """A sentence of seven words that shares none with a line of other marks."""
    return " ".join(f"{letter}{'-'.join(map(str, marks))}" for letter in "abcdefg") + "."


# ---- documents ------------------------------------------------------------------------------

def test_titles_have_few_words_and_no_end_and_like_fragments_and_long_lines_are_not_paired():
    assert is_title("History of the Netherlands") and not is_title("It rains.")
    assert not is_title('He said "no"') and not is_title("a b c d e f g h i")
    assert can_be_paired("This line has exactly six words.") and can_be_paired(" ".join("a" * 64))
    for words in ("Only five words are here.", "A title line of six words", "a " * 65):
        assert not can_be_paired(words)


def test_blank_lines_make_documents_or_else_titles_do_and_after_64_lines_one_is_cut():
    lines = ["First", line(1), line(2), "Second", line(3)]
    assert find_documents(lines, [0, 0, 0, 0, 1]) == [range(0, 4), range(4, 5)]
    assert find_documents(lines, None) == [range(0, 3), range(3, 5)]
    lines = ["Title"] + [line(i) for i in range(150)] + ["Next", line(151)]
    found = find_documents(lines, None)
    assert [len(rows) for rows in found] == [64, 64, 23, 2]
    assert [row for rows in found for row in rows] == list(range(153))
    assert [len(rows) for rows in find_documents(lines, [0] * 153)] == [64, 64, 25]


def test_a_shuffled_corpus_is_refused_since_it_has_hardly_any_titles():
    lines = [line(i) for i in range(995)]
    assert find_documents(lines + ["Title"] * 5, None)
    with pytest.raises(ValueError, match="0 titles in 995 lines, so they seem shuffled.*another"):
        find_documents(lines, None)
    with pytest.raises(ValueError, match="4 titles in 999 lines"):
        find_documents(lines + ["Title"] * 4, None)


# ---- clusters -------------------------------------------------------------------------------

@pytest.mark.parametrize("edge, above, below", [
    (.984808, [{0}, {1}, {2}, {3}], [{0}, {1}, {2, 3}]),
    (.939693, [{0}, {1}, {2, 3}], [{0, 1}, {2, 3}]),
    (.085505, [{0, 1}, {2, 3}], [{0, 1, 2, 3}])])
def test_the_most_similar_are_merged_first_each_up_to_its_own_similarity(edge, above, below):
    """cos 10°, cos 20°, and the mean of the four cosines between the two pairs."""
    for change, expected in ((1e-5, above), (-1e-5, below)):
        found = average_linkage(cosines(0, 20, 90, 100), threshold=edge + change)
        assert groups(found) == partition(*expected)


def test_linkage_is_the_average_and_neither_the_nearest_nor_the_farthest():
    """The third merge is at 0.879422, the mean of 0.939693 and 0.819152."""
    link = partial(average_linkage, cosines(0, 20, 35, 90, 100))
    whole, split = partition({0, 1, 2}, {3, 4}), partition({0}, {1, 2}, {3, 4})
    assert groups(link(threshold=.80)) == groups(link(threshold=.8794)) == whole
    assert groups(link(threshold=.8795)) == groups(link(threshold=.80, largest=2)) == split


def test_of_equal_pairs_the_first_in_reading_order_is_merged_first():
    assert average_linkage(np.ones((0, 0)), threshold=.5).tolist() == []
    equal = np.full((4, 4), .9)
    assert groups(average_linkage(equal, threshold=.5, largest=2)) == partition({0, 1}, {2, 3})
    assert average_linkage(equal, threshold=.5, largest=3).tolist() == [0, 0, 0, 3]


def slow_linkage(similarity, threshold, largest):
    """Means over all members, computed anew at every step."""
    clusters = [[i] for i in range(len(similarity))]
    while True:
        best = max(((np.mean([similarity[i, j] for i in a for j in b]), a, b)
                    for a, b in combinations(clusters, 2) if len(a) + len(b) <= largest),
                   default=(-1, None, None), key=lambda found: found[0])
        if best[0] < threshold:
            return {frozenset(cluster) for cluster in clusters}
        clusters = [c for c in clusters if c not in best[1:]] + [best[1] + best[2]]


def random_cosines(n, seed):
    x = F.normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).double())
    return (x @ x.mT).numpy()


@pytest.mark.parametrize("seed", range(5))
def test_clusters_equal_those_of_means_over_all_members(seed):
    similarity = random_cosines(13, seed)
    for threshold in (.9, .6, .2):
        for largest in (2, 5, 13):
            found = average_linkage(similarity, threshold=threshold, largest=largest)
            assert groups(found) == slow_linkage(similarity, threshold, largest)


def test_the_order_of_sentences_changes_nothing_but_their_numbers():
    similarity = cosines(0, 20, 35, 90, 100)
    usual = groups(average_linkage(similarity, threshold=.8))
    for order in permutations(range(5)):
        moved = average_linkage(similarity[np.ix_(order, order)], threshold=.8)
        assert {frozenset(order[place] for place in group) for group in groups(moved)} == usual


# ---- threshold ------------------------------------------------------------------------------

WITHIN = np.concatenate([s[np.triu_indices(len(s), 1)]
                         for s in (cosines(0, 20, 90, 100), cosines(10, 200))])


def test_the_quantile_inside_documents_is_interpolated_and_other_documents_set_a_floor():
    assert len(WITHIN) == 7
    found = similarity_threshold(WITHIN, np.zeros(3), quantile=.7)
    assert found == pytest.approx(.461555, abs=1e-6)
    across = np.array([.5, .7])                                   # population deviation .1
    assert similarity_threshold(WITHIN, across, quantile=.7) == pytest.approx(.6 + .3)
    assert similarity_threshold(WITHIN, across, quantile=1.) == pytest.approx(.95)   # at most
    assert similarity_threshold(WITHIN, np.array([-.9]), quantile=0.) == 0           # at least
    assert similarity_threshold(np.empty(0), np.empty(0), quantile=.9) == .95   # nothing to compare


# ---- annotation -----------------------------------------------------------------------------

DOCUMENTS = [range(0, 4), range(4, 6)]
LINES = [line(i) for i in range(6)]


def annotated(angles, lines=LINES, documents=DOCUMENTS, quantile=.7):
    """The annotation by an encoder that knows the angle of each line."""
    angle = dict(zip(lines, angles))
    return annotate(lines, documents, lambda texts: at(*(angle[text] for text in texts)),
                    quantile=quantile)


@pytest.fixture
def threshold(monkeypatch):
    """threshold(x): from now on positive pairs begin at x. Returns the quantiles asked for."""
    def fix(value):
        asked = []
        monkeypatch.setattr(infocse, "similarity_threshold",
                            lambda *_, quantile: asked.append(quantile) or value)
        return asked
    return fix


def test_no_pairs_across_documents_even_if_a_foreign_sentence_is_the_nearest(threshold):
    """Line 4, at 10 degrees, lies between lines 0 and 1 of the other document."""
    threshold(.8)
    found = annotated((0, 20, 90, 100, 10, 200))
    assert groups(found.cluster.values()) == partition({0, 1}, {2, 3}, {4}, {5})
    assert found.pairs == pytest.approx({(0, 1): .939693, (2, 3): .984808}, abs=1e-6)


def test_weak_members_of_a_cluster_are_no_pair(threshold):
    """Between 0 and 35 degrees the cosine is 0.819152, though both belong to the cluster."""
    threshold(.85)
    found = annotated((0, 20, 35, 90, 270), LINES[:5], [range(5)])
    assert groups(found.cluster.values()) == partition({0, 1, 2}, {3}, {4})
    assert [*found.pairs] == [(0, 1), (1, 2)]


def test_equal_and_nearly_equal_texts_are_trivial_and_no_pair(threshold):
    threshold(.5)
    lines = ["One two three four five six.", "one  TWO three four five six.",
             "one two three four five six. seven.", "a b c d e f."]   # 6 / 7 of the words shared
    found = annotated((0,) * 4, lines, [range(4)])
    assert [*found.pairs] == [(0, 3), (1, 3), (2, 3)]
    assert set(found.cluster.values()) == {0}                     # still no negatives of each other


def test_lines_that_cannot_be_paired_stay_alone_and_count_for_the_coverage(threshold):
    threshold(.5)
    lines = [line(1), "A title", line(2), "Short.", line(3)]
    found = annotated((0, None, 100, None, 9), lines, [range(5)])
    assert found.cluster == {0: 0, 1: 1, 2: 2, 3: 3, 4: 0}
    assert [*found.pairs] == [(0, 4)] and found.coverage == 2 / 5


def random_documents(seed, documents=20, size=7, width=33):
    """Lines, documents and an encoder: each document has two topics, in turns, and much noise."""
    lines = [line(seed, i) for i in range(documents * size)]
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(documents, 1, 2, width, generator=generator).expand(-1, size, -1, -1)
    x = topics.flatten(0, 1)[range(len(lines)), [i % 2 for i in range(len(lines))]]
    x = x + .8 * torch.randn(len(lines), width, generator=generator)
    row = {text: i for i, text in enumerate(lines)}
    return (lines, [range(i, i + size) for i in range(0, len(lines), size)],
            lambda texts, **how: x[[row[text] for text in texts]])


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_of_one_document_and_cluster_and_nobody_is_their_own(seed):
    lines, documents, encode = random_documents(seed)
    found = annotate(lines, documents, encode, quantile=.8)
    assert found.pairs
    for (i, j), cosine in found.pairs.items():
        assert i < j and i // 7 == j // 7 and found.cluster[i] == found.cluster[j]
        assert cosine >= found.threshold
    table, chance = pair_table(found.pairs, list(range(140)), width=7, temperature=.1)
    of = [{int(j) for j, p in zip(*row) if p} for row in zip(table, chance)]
    assert all(i in of[j] for i in range(140) for j in of[i])
    assert all(i not in of[i] for i in range(140))


def test_a_higher_quantile_never_covers_more():
    lines, documents, encode = random_documents(0)
    covered = [annotate(lines, documents, encode, quantile=q).coverage
               for q in (.8, .85, .9, .95, 1.)]
    assert covered == sorted(covered, reverse=True) and covered[0] > covered[-1]


def test_where_most_are_in_a_pair_the_quantile_is_raised_once(threshold):
    asked = threshold(.1)
    annotated((0, 1, 2, 3, 4, 5), quantile=.9)
    annotated((0, 1, 180, 90, 0, 180), quantile=.9)
    assert asked == pytest.approx([.9, .93, .9])


@pytest.mark.filterwarnings("ignore:infocse. only")
def test_without_a_line_that_can_be_paired_nobody_is():
    found = annotate(["Short.", "Also."], [range(2)], lambda texts: torch.empty(0, 2), quantile=.9)
    assert found.cluster == {0: 0, 1: 1} and not found.pairs and found.coverage == 0


# ---- drawing a positive ---------------------------------------------------------------------

def test_nearer_ones_are_drawn_more_often():
    """z_i at 0 degrees, its pairs with those at 20 and 40, τ 0.1."""
    pairs = {(0, 1): math.cos(math.radians(20)), (0, 2): math.cos(math.radians(40))}
    table, chance = pair_table(pairs, [0, 1, 2, 3], width=3, temperature=.1)
    assert table.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    far = math.exp((pairs[0, 2] - pairs[0, 1]) / .1)              # (.766 - .940) / .1: .176 to 1
    assert chance[0].tolist() == pytest.approx([1 / (1 + far), far / (1 + far), 0])
    assert chance[0, 0].item() == pytest.approx(.850240, abs=1e-6)
    assert chance[1].tolist() == chance[2].tolist() == [1, 0, 0] and not chance[3].any()


def corpus_of(lines, documents):
    return data.Corpus("a", [lines], documents, "", 0)


CORPUS = corpus_of(LINES, [0, 0, 0, 0, 1, 1])


def method(kind=InfoCSE, corpus=CORPUS, **settings):
    model = SentenceEncoder(Encoder(EncoderConfig("bert", 7, 3, 1, 1, 5)), pooling="cls")
    settings = {"batch_size": 2} | settings
    return kind(corpus, kind.Config(**settings), model=model)


def known_pairs(**settings):
    """Lines 0 and 1 draw each other, 2 draws 0 or 3, and 3 draws 2."""
    built = method(largest_cluster=3, **settings)
    built.paired[:4] = torch.tensor([[1, 0], [0, 0], [0, 3], [2, 0]])
    built.chance[:4] = torch.tensor([[1, 0], [1, 0], [.85, .15], [1, 0.]])
    return built


def test_half_of_the_time_the_positive_is_another_one_drawn_by_its_chance():
    built, rng = known_pairs(), random.Random(0)
    drawn = Counter(built.views([2], rng)[1][0] for _ in range(4000))
    shares = [drawn[LINES[row]] / 4000 for row in (2, 0, 3)]
    assert shares == pytest.approx([.5, .425, .075], abs=.03) and sum(drawn.values()) == 4000


def test_the_anchor_is_never_changed_and_who_is_in_no_pair_is_their_own_positive():
    assert known_pairs(own_rate=0.).views([0, 4, 1], random.Random(0)) == [
        [LINES[0], LINES[4], LINES[1]], [LINES[1], LINES[4], LINES[0]]]
    assert known_pairs(own_rate=1.).views([0, 1, 2], random.Random(0)) == [LINES[:3]] * 2


@pytest.mark.parametrize("view", ["dropout", "delete-words"])
def test_before_the_first_annotation_it_is_simcse_bit_for_bit_whatever_the_view(view):
    torch.manual_seed(0)
    out = Encoded(list(torch.randn(2, 6, 3)), 1, 9, torch.arange(6))
    ours, plain = (method(kind, positives=view) for kind in (InfoCSE, SimCSE))
    assert ours.views([0, 3, 5], random.Random(7)) == plain.views([0, 3, 5], random.Random(7))
    assert torch.equal(ours.loss(out), plain.loss(out))


# ---- the loss -------------------------------------------------------------------------------

def masked(anchor, positive, cluster):
    built, rows = method(), torch.arange(len(anchor))
    built.cluster[rows] = torch.tensor(cluster)
    return built.loss(Encoded([anchor, positive], 1, 9, rows))


def test_sentences_of_a_cluster_are_no_negatives_of_each_other():
    """Anchors 0 and 1 see their own positive, 20° away, and the third one, 10° away."""
    anchor, positive = at(0, 20, 10), at(20, 0, 10)
    e = {angle: math.exp(math.cos(math.radians(angle)) / .05) for angle in (0, 10, 20)}
    each = [math.log((e[20] + e[10]) / e[20])] * 2 + [math.log((e[0] + 2 * e[10]) / e[0])]
    assert each == pytest.approx([1.242791, 1.242791, .906624], abs=1e-6)
    assert masked(anchor, positive, [7, 7, 9]).item() == pytest.approx(sum(each) / 3)
    assert masked(anchor, positive, [7, 8, 9]).item() == pytest.approx(1.580731, abs=1e-6)


def test_equal_texts_are_no_negatives_of_each_other():
    corpus = corpus_of([line(1), line(2), line(1).upper(), line(3)], [0, 0, 1, 1])
    torch.manual_seed(0)
    anchor, positive = torch.randn(2, 4, 3).double()
    found = method(corpus=corpus).loss(Encoded([anchor, positive], 1, 9, torch.arange(4)))
    assert found == masked(anchor, positive, [7, 8, 7, 9]) != info_nce(anchor, positive)


def test_no_gradient_reaches_what_is_masked_and_everybody_keeps_their_own_positive():
    anchor, positive = at(0, 20, 10), at(20, 0, 10).requires_grad_()
    masked(anchor, positive, [7, 7, 7]).backward()                # nobody has a negative
    assert positive.grad.abs().max() < 1e-12
    ours, loop = at(20, 0, 10).requires_grad_(), at(20, 0, 10).requires_grad_()
    masked(anchor, ours, [7, 7, 9]).backward()
    for i, kept in enumerate(([0, 2], [1, 2], [0, 1, 2])):
        s = F.cosine_similarity(anchor[i], loop) / .05
        ((s[kept].logsumexp(0) - s[i]) / 3).backward()
    assert torch.allclose(ours.grad, loop.grad, atol=1e-12) and ours.grad.isfinite().all()


# ---- rounds ---------------------------------------------------------------------------------

MANY = corpus_of([line(i) for i in range(400)], [i // 10 for i in range(400)])


def test_rounds_have_as_many_steps_and_documents_stay_together():
    built = method(corpus=MANY, batch_size=5)
    rounds = built.rounds(80)                                     # one pass: 400 rows
    assert [(count, len(rows)) for count, rows in rounds] == [(20, 100)] * 4
    assert sorted(row for _, rows in rounds for row in rows) == list(range(400))
    assert all(len({row // 10 for row in rows}) == 10 for _, rows in rounds)
    assert rounds == built.rounds(80) != method(corpus=MANY, batch_size=5, seed=1).rounds(80)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 133])
def test_rounds_fill_any_number_of_steps_and_no_row_comes_twice_before_all_came(steps):
    rounds = method(corpus=MANY, batch_size=7).rounds(steps)
    assert len(rounds) == min(4, steps) and sum(count for count, _ in rounds) == steps
    assert all(len(rows) == 7 * count > 0 for count, rows in rounds)
    times = Counter(row for _, rows in rounds for row in rows)
    assert max(times.values()) - min([*times.values(), *[0] * (len(times) < 400)]) <= 1


def refreshable(quantile=.8, **settings):
    """The method on 30 documents of 7 sentences, and their encoder."""
    lines, _, encode = random_documents(0, documents=30)
    corpus = corpus_of(lines, [i // 7 for i in range(210)])
    return method(corpus=corpus, annotation_quantile=quantile, **settings), encode


def test_a_round_annotates_its_own_documents_whole_and_leaves_the_others_alone():
    built, encode = refreshable()
    built.refresh(encode, [*range(14, 70), 80])                   # documents 2 to 9, and one of 11
    looked_at = {*range(2, 10), 11, *(row // 7 for row in built.probe)}
    changed = {row // 7 for row in built.chance.any(dim=1).nonzero()[:, 0].tolist()}
    assert changed <= looked_at and len(changed) > 4
    again = annotate(built.corpus.columns[0], [range(7 * n, 7 * n + 7) for n in sorted(looked_at)],
                     encode, quantile=.8, seed=42)
    assert all(built.cluster[row] == again.cluster[row] for row in again.cluster)
    assert built.logs()["coverage"] == pytest.approx(again.coverage)


def test_with_hardly_any_pairs_the_round_is_simcse_and_says_so():
    built, encode = refreshable(quantile=.999)
    with pytest.warns(UserWarning, match="infocse: only .* lower --annotation-quantile"):
        built.refresh(encode, range(210))
    assert torch.equal(built.cluster, torch.arange(210)) and not built.chance.any()
    assert built.logs()["coverage"] == pytest.approx(2 / 210)     # one pair, of no use


def test_agreement_compares_the_probe_with_the_annotation_before():
    built, encode = refreshable()
    built.refresh(encode, range(100))
    assert "agreement" not in built.logs()
    built.refresh(encode, range(100))
    assert built.logs()["agreement"] == 1
    built.refresh(lambda texts, **how: encode(texts) * torch.arange(33), range(100))
    assert built.logs()["agreement"] < .9


def test_the_frozen_annotator_looks_once_and_at_everything_cut_as_for_training():
    built, encode = refreshable(annotator="frozen", max_tokens=9)
    seen = []
    built.refresh(lambda texts, **how: seen.append((len(texts), how)) or encode(texts), range(14))
    built.refresh(lambda texts, **how: 1 / 0, range(14, 100))
    assert seen == [(210, {"max_tokens": 9})] and built.annotations == 1


def test_the_index_of_rand_is_one_for_equal_and_about_zero_for_unrelated_clusters():
    """Hubert & Arabie's contingency table, by its definition over all pairs."""
    torch.manual_seed(0)
    a, b = torch.randint(5, (60,)), torch.randint(4, (60,))
    assert adjusted_rand(a, (a + 3) * 7) == 1 and abs(adjusted_rand(a, b)) < .1
    assert adjusted_rand(torch.arange(5), torch.arange(5)) == 1
    x, y = ((label[:, None] == label).triu(1) for label in (a, b))   # pairs that are together
    both, in_a, in_b = (x & y).sum().item(), x.sum().item(), y.sum().item()
    chance = in_a * in_b / math.comb(60, 2)
    expected = (both - chance) / ((in_a + in_b) / 2 - chance)
    assert adjusted_rand(a, b) == pytest.approx(expected)


# ---- with an encoder ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    """40 documents of 8 sentences, two topics in each."""
    path = tmp_path_factory.mktemp("corpus") / "articles.txt"
    does = ["runs home with all of us", "sees the long road to town", "eats bread and some butter",
            "reads many books in the evening"]
    path.write_text("\n".join("".join(f"the {who} number {i} {what}.\n" for who in ("dog", "owl")
                                      for what in does) for i in range(40)))
    return path


@pytest.fixture
def train(program, articles):
    return partial(program, method="infocse", corpus=articles, steps=16)


@pytest.fixture
def job(tiny, articles, pairs):
    """What `mincse.fit` trains, and its encoder."""
    inputs = mincse.read_inputs({"method": "infocse", "encoder": str(tiny), "test": str(pairs),
                                 "corpus": str(articles), "batch_size": 8, "steps": 16})
    return mincse.build(inputs, inputs.config)


def test_annotating_changes_neither_the_encoder_nor_any_random_state(job):
    model, built = job.model.train(), job.method
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
    built, steps = job.method, []
    views, refresh = built.views, built.refresh
    built.views = lambda rows, rng: steps.append(
        (int(built.annotations), threading.current_thread().name)) or views(rows, rng)
    built.refresh = lambda encode, rows: steps.append("refresh") or refresh(encode, rows)
    assert len(list(mincse.batches_by_round(job, first=1))) == 16
    threads = [step[1] for step in steps if step != "refresh"]
    assert threading.current_thread().name not in threads
    assert [step if step == "refresh" else step[0] for step in steps] == [
        *[0] * 4, "refresh", *[1] * 4, "refresh", *[2] * 4, "refresh", *[3] * 4]


def test_a_run_that_goes_on_annotates_only_what_lies_ahead(job):
    built, calls, plan = job.method, [], job.method.rounds(16)
    built.refresh = lambda encode, rows: calls.append(rows)
    whole = [batch.rows.tolist() for batch in mincse.batches_by_round(job, first=1)]
    assert whole == list(data.row_order(plan, 8, seed=42))
    for first, refreshed in ((1, 3), (4, 3), (5, 3), (6, 2), (13, 1), (14, 0)):
        calls.clear()
        ahead = [batch.rows.tolist() for batch in mincse.batches_by_round(job, first=first)]
        assert ahead == whole[first - 1 :]
        assert calls == [rows for _, rows in plan[4 - refreshed :]]


def test_a_run_annotates_after_the_first_quarter_and_logs_what_it_found(train, pairs):
    folder = train(dev=pairs, dev_every=4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10, 12, 16]
    names = {"threshold", "coverage"}
    assert not names & lines[0].keys() and all(names <= line.keys() for line in lines[1:])
    assert ["agreement" in line for line in lines] == [False, False, True, True, True]
    assert lines[-1]["coverage"] > 0


def test_without_documents_it_is_refused_before_anything_is_written(
        train, sentences, tmp_path, capsys):
    for flag in ((), ("--dry-run",)):
        with pytest.raises(SystemExit) as refused:
            train(*flag, corpus=sentences)
        said = capsys.readouterr().err
        assert refused.value.code == 3 and "found 0 titles in 64 lines" in said
        assert not (tmp_path / "run").exists()


def test_a_small_encoder_has_a_stricter_quantile():
    for width, expected in ((256, (128, .95)), (768, (64, .9))):
        config = resolved("infocse", width=width)
        assert (config.batch_size, config.annotation_quantile) == expected
        assert (config.annotation_rounds, config.largest_cluster, config.own_rate,
                config.mate_temperature) == (3, 8, .5, .1)


@pytest.mark.parametrize("name, value", [
    ("annotation_rounds", 0), ("annotation_quantile", 1.), ("largest_cluster", 1),
    ("own_rate", 1.1), ("mate_temperature", 0.)])
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        check_ranges(Config(**{name: value}))
    check_ranges(Config(own_rate=1.))


# ---- mutual reinforcement -------------------------------------------------------------------

def annotations_of_a_toy(seed, *, documents=40, width=64):
    """(pairs, share of the same topic) of both annotations: noisy features, a linear encoder."""
    torch.manual_seed(seed)
    topic = torch.arange(2 * documents).repeat_interleave(5)      # two in a document
    signal = torch.randn(2 * documents, width) * (torch.arange(width) < width // 2)
    noise = torch.randn(len(topic), width) * (.5 + .5 * (torch.arange(width) >= width // 2))
    lines, x = [line(i) for i in range(len(topic))], signal[topic] + noise
    corpus = corpus_of(lines, [i // 10 for i in range(len(lines))])
    built = method(corpus=corpus, annotation_quantile=.8, seed=seed)
    encoder = torch.nn.Linear(width, width // 2, bias=False)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    row, annotations = {text: i for i, text in enumerate(lines)}, []

    def features(texts):
        return x[[row[text] for text in texts]]

    def encode(texts, **how):
        return encoder(features(texts)).detach()

    for number in range(3):
        if number:
            built.refresh(encode, range(len(lines)))
            pairs = annotate(lines, built.documents, encode, quantile=.8).pairs
            same = [bool(topic[i] == topic[j]) for i, j in pairs]
            annotations.append((len(pairs), sum(same) / len(same)))
        for step, rows in enumerate(data.batches(len(lines), 40, seed=number, epochs=4)):
            columns = [encoder(F.dropout(features(texts), .2))
                       for texts in built.views(rows, random.Random(step))]
            loss = built.loss(Encoded(columns, 1, 9, torch.tensor(rows)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return annotations


def test_a_better_encoder_finds_half_as_many_pairs_again_and_as_pure_ones():
    """Nearly all pairs are pure, before and after: which is purer, rounding may decide."""
    toys = [annotations_of_a_toy(seed) for seed in range(5)]
    assert all(second[0] > 1.5 * first[0] for first, second in toys), toys
    assert all(second[1] >= first[1] - .01 and second[1] > .98 for first, second in toys), toys

"""Finding and drawing negatives: neighbours, masks, and the pairs of DebCSE."""

import math
import random
from collections import Counter

import pytest
import torch

from losses import cosine, info_nce
from negatives import (EMPTY, Words, compare, debiased_pairs, document_mates, draw, draw_weighted,
                       edit_distance, effective_size, first_texts, index, input_weight,
                       inverse_propensity, nearest_others, negative_pool, positive_pool,
                       propensity, random_others, rare_word_mates, some_of, surface_bin)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- exact nearest neighbours ---------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
@pytest.mark.parametrize("k", [1, 8, 49])
def test_the_nearest_others_are_those_of_the_full_table_whatever_the_chunk(chunk, k):
    x = torch.randn(50, 5, generator=generator()).double()
    expected = [sorted((j for j in range(50) if j != i),
                       key=lambda j: -torch.cosine_similarity(x[i], x[j], dim=0).item())[:k]
                for i in range(50)]
    assert nearest_others(x, k, chunk=chunk).tolist() == expected


def test_nobody_is_their_own_neighbour_even_among_equals():
    found = nearest_others(torch.ones(6, 3), 5, chunk=4)
    assert [sorted(row) for row in found.tolist()] == [
        [j for j in range(6) if j != i] for i in range(6)]


def test_the_length_of_a_vector_does_not_matter():
    x = torch.randn(20, 4, generator=generator()).double()
    longer = x * torch.linspace(.1, 9, 20)[:, None]
    assert torch.equal(nearest_others(x, 3), nearest_others(longer, 3))


@pytest.mark.parametrize("k", [0, 6, 7])
def test_more_neighbours_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"expected 1 to 5 neighbours.*found {k}"):
        nearest_others(torch.randn(6, 3), k)


def test_the_index_holds_the_vectors_of_the_encoder_in_order():
    texts = [f"text {i}" for i in range(20)]
    asked = []

    def encode(some):
        asked.append(len(some))
        return torch.tensor([[float(text.split()[1]), 1.] for text in some])

    found = index(encode, texts, chunk=8)
    assert found.dtype == torch.float16 and found[:, 0].tolist() == list(range(20))
    assert max(asked) == 8                                        # never a million at once


# ---- retrieved negatives --------------------------------------------------------------------

def test_of_texts_with_one_number_the_first_stands_for_all():
    assert first_texts(["A dog", "a cat", "a dog", "an elk"], [0, 1, 0, 2]) == [
        "A dog", "a cat", "an elk"]


def test_draws_come_from_the_neighbours_none_twice_and_each_as_often():
    rng, seen = random.Random(0), Counter()
    for _ in range(3000):
        columns = draw([[10, 11, 12, 13], [20, 21, 22, 23]], 2, rng)
        for b, tens in enumerate((10, 20)):
            pick = [column[b] for column in columns]
            assert len(set(pick)) == 2 and all(tens <= number < tens + 4 for number in pick)
            seen.update(pick)
    assert len(seen) == 8 and all(abs(n - 1500) < 150 for n in seen.values())


def test_draws_are_a_function_of_the_random_source_and_may_take_all_or_none():
    near = [[1, 2, 3]] * 2
    assert draw(near, 2, random.Random(5)) == draw(near, 2, random.Random(5))
    assert [sorted(pick) for pick in zip(*draw(near, 3, random.Random(5)))] == near
    assert draw(near, 0, random.Random(5)) == []
    with pytest.raises(ValueError):
        draw(near, 4, random.Random(5))


def degrees(*angles):
    angles = torch.tensor(angles, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


ANCHORS, POSITIVES, RETRIEVED = degrees(0, 90), degrees(10, 80), degrees(30, 45)
OTHERS = input_weight(torch.tensor([[7], [9]]), torch.tensor([[4], [5]]))
COLLIDING = input_weight(torch.tensor([[7], [9]]), torch.tensor([[4], [7]]))


@pytest.mark.parametrize("candidates, weight, expected", [
    (POSITIVES, None, 9.0024e-08),
    (torch.cat([POSITIVES, RETRIEVED]), OTHERS, .048173),
    (torch.cat([POSITIVES, RETRIEVED]), COLLIDING, .046405)],
    ids=["without", "shared by all", "one of them is the anchor itself"])
def test_the_worked_example_of_cards(candidates, weight, expected):
    found = info_nce(ANCHORS, candidates, weight=weight)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_rows_of_the_worked_example():
    both = torch.cat([POSITIVES, RETRIEVED])
    rows = [info_nce(ANCHORS[[i]], both[[i, 1 - i, 2, 3]]).item() for i in (0, 1)]
    assert rows == pytest.approx([.092421, .003926], abs=1e-6)
    own = [info_nce(ANCHORS[[i]], both[[i, 1 - i, 2 + i]]).item() for i in (0, 1)]
    assert own == pytest.approx([.088885, .003864], abs=1e-6)


def test_alpha_stands_on_the_own_retrieved_and_zero_where_a_text_is_the_anchor():
    anchors = torch.tensor([[5, 1, 0], [5, 2, 2]])
    retrieved = torch.tensor([[3, 3, 3], [5, 1, 0], [5, 2, 2], [5, 1, 1]])     # s = 2, B = 2
    assert input_weight(anchors, retrieved, alpha=.5).tolist() == [
        [1, 1, .5, 0, .5, 1], [1, 1, 1, .5, 0, .5]]


def test_a_masked_retrieved_text_has_no_gradient_from_that_anchor_and_has_from_the_other():
    for anchor, expected in ((0, False), (1, True)):
        retrieved = RETRIEVED.clone().requires_grad_()
        logits = cosine(ANCHORS, torch.cat([POSITIVES, retrieved])) / .05 + COLLIDING.log()
        logits[anchor].logsumexp(dim=0).backward()
        assert retrieved.grad[1].any() == expected and retrieved.grad[0].any()


def test_more_negatives_never_lower_the_loss_and_a_weight_of_zero_undoes_them():
    torch.manual_seed(0)
    a, p, n = (torch.randn(5, 3).double() for _ in range(3))
    ids = torch.arange(10)[:, None]
    plain, both = info_nce(a, p), info_nce(a, torch.cat([p, n]), weight=input_weight(
        ids[:5], ids[5:]))
    assert both > plain
    own_only = torch.cat([torch.ones(5, 5), torch.eye(5) * 1e-300], dim=1).double()
    assert info_nce(a, torch.cat([p, n]), weight=own_only).item() == pytest.approx(plain.item())


# ---- candidates -----------------------------------------------------------------------------

def test_random_others_are_any_but_the_own():
    found = random_others(5, 2000, generator())
    for i in range(5):
        counts = Counter(found[i].tolist())
        assert set(counts) == set(range(5)) - {i} and min(counts.values()) > 400
    assert random_others(2, 3, generator()).tolist() == [[1] * 3, [0] * 3]


def test_some_of_a_pool_are_all_different_and_no_more_than_there_are():
    pool = torch.arange(12).view(2, 6)
    found = some_of(pool, 4, generator())
    for row, own in zip(found.tolist(), pool.tolist()):
        assert len(set(row)) == 4 and set(row) <= set(own)
    assert some_of(pool, 9, generator()).shape == (2, 6)
    assert some_of(pool[:, :0], 9, generator()).shape == (2, 0)


def test_document_mates_are_the_sentences_before_and_after_in_the_same_document():
    assert document_mates([0, 0, 0, 1, 2, 2], 6).tolist() == [
        [EMPTY, 1], [0, 2], [1, EMPTY], [EMPTY, EMPTY], [EMPTY, 5], [4, EMPTY]]
    assert (document_mates(None, 3) == EMPTY).all()


def test_rare_word_mates_share_most_of_the_rare_words():
    """"u" is in five texts of eight, so it is common; a word in two texts is rare."""
    texts = ["u a b c", "u A B", "u c", "d", "u D e", "f u", "g", "h"]
    assert rare_word_mates(texts, 2).tolist() == [
        [1, 2], [0, EMPTY], [0, EMPTY], [4, EMPTY], [3, EMPTY]] + [[EMPTY, EMPTY]] * 3
    assert (rare_word_mates(texts * 700, 2) == EMPTY).all()       # of 5,600 texts: below 5.6


# ---- likeness on the surface ----------------------------------------------------------------

def by_recursion(a, b):
    """Levenshtein as its definition says."""
    if not a or not b:
        return len(a) + len(b)
    return min(by_recursion(a[1:], b[1:]) + (a[0] != b[0]), by_recursion(a[1:], b) + 1,
               by_recursion(a, b[1:]) + 1)


def test_the_edit_distance_is_that_of_its_definition():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(120)]
    words = Words.of(texts, most=9)
    pairs = torch.tensor([[rng.randrange(120), rng.randrange(120)] for _ in range(200)])
    found = edit_distance(words[pairs[:, 0]], words[pairs[:, 1]])
    back = edit_distance(words[pairs[:, 1]], words[pairs[:, 0]])
    assert found.tolist() == back.tolist() == [
        by_recursion(texts[i].split(), texts[j].split()) for i, j in pairs.tolist()]


def test_the_surface_of_two_sentences_worked_out_by_hand():
    words = Words.of(["The cat sat on the mat", "the cat is on a mat"], most=32)
    one = torch.tensor([0]), torch.tensor([1])
    assert edit_distance(words[one[0]], words[one[1]]).item() == 2            # surf 1 - 2/6
    assert surface_bin(words[one[0]], words[one[1]], 300).item() == 200


def test_bins_are_counted_in_whole_numbers_and_equal_texts_fall_into_the_last():
    ten = "a b c d e f g h i j"
    words = Words.of([ten, "a " + " ".join("klmnopqrs"), ten.upper(), "x y"], most=32)
    first = words[torch.zeros(3, dtype=torch.long)]
    assert surface_bin(first, words[torch.tensor([1, 2, 3])], 10).tolist() == [1, 9, 0]
    assert math.floor(10 * (1 - 9 / 10)) == 0                     # what floating point makes of it


def test_words_behind_the_cut_do_not_count():
    words = Words.of(["a b c", "a b d"], most=2)
    assert edit_distance(words[torch.tensor([0])], words[torch.tensor([1])]).item() == 0


# ---- inverse propensity ---------------------------------------------------------------------

SEM_P, SURF_P = torch.tensor([[.95, .85, .80, .60]]), torch.tensor([[.9, .6, .3, .1]])
SEM_N, SURF_N = torch.tensor([[.2, .4, .75, .3]]), torch.tensor([[.1, .4, .8, .8]])
E_P, E_N = torch.tensor([.1, .2, .3, .4]), torch.tensor([.6, .25, .1, .05])


def quarters(surface):
    return (4 * surface).long().clamp(max=3)


def test_the_positive_weights_of_the_worked_example():
    relevance = SEM_P.where(SEM_P >= .7, 0)
    chance = inverse_propensity(relevance, quarters(SURF_P), E_P, least=.05)
    assert chance[0].tolist() == pytest.approx([.257919, .307692, .434389, 0], abs=1e-6)
    assert (chance * SURF_P).sum().item() == pytest.approx(.547059, abs=1e-6)
    plain = inverse_propensity(relevance, quarters(SURF_P), torch.ones(4), least=.05)
    assert (plain * SURF_P).sum().item() == pytest.approx(.617308, abs=1e-6)


def test_the_negative_weights_of_the_worked_example():
    relevance = (1 - SEM_N).where(SEM_N <= .6, 0)
    chance = inverse_propensity(relevance, quarters(SURF_N), E_N, least=.1)
    assert chance[0].tolist() == pytest.approx([.124224, .223602, 0, .652174], abs=1e-6)


def test_where_relevance_is_constant_every_bin_is_drawn_as_often():
    surface = torch.tensor([[.05, .1, .2, .3, .35, .55, .6, .62, .7, .74, .8, .9, .92, .95, .96,
                             1.]])
    bins = quarters(surface)
    emitted = propensity(bins, torch.ones_like(bins).bool(), 4)
    assert emitted.tolist() == [.1875, .125, .3125, .375]
    chance = inverse_propensity(torch.ones(1, 16), bins, emitted, least=.01)[0]
    assert [chance[bins[0] == b].sum().item() for b in range(4)] == pytest.approx([.25] * 4)


def test_chances_sum_to_one_or_are_all_zero():
    torch.manual_seed(0)
    relevance = torch.rand(40, 6) * (torch.rand(40, 6) > .7)
    chance = inverse_propensity(relevance, torch.randint(0, 4, (40, 6)), E_P, least=.02)
    assert torch.equal(chance == 0, relevance == 0)
    assert chance.sum(1).tolist() == pytest.approx(relevance.any(1).double().tolist())
    assert not relevance.any(1).all()


def test_a_higher_clip_only_flattens():
    torch.manual_seed(0)
    relevance, bins = torch.rand(1, 50) + .5, torch.randint(0, 4, (1, 50))
    emitted, ratios = torch.tensor([.001, .009, .29, .7]), []
    for least in (.0001, .01, .1, .5):
        chance = inverse_propensity(relevance, bins, emitted, least=least)
        ratios.append((chance.max() / chance.min()).item())
        assert ratios[-1] <= (relevance.max() / relevance.min() / least).item()
    assert ratios == sorted(ratios, reverse=True)


def test_an_empty_place_is_nothing_to_a_histogram():
    pool = torch.tensor([[1, EMPTY], [0, 1]])
    assert propensity(torch.tensor([[0, 3], [1, 1]]), pool != EMPTY, 4).tolist() == [
        1 / 3, 2 / 3, 0, 0]


def test_draws_follow_the_chances_with_a_share_for_the_other():
    pool = torch.tensor([[10, 11, 12]] * 4000)
    chance = torch.tensor([[.5, .5, 0]] * 4000)
    found = draw_weighted(pool, chance, torch.full((4000,), 99), share=.25, count=2,
                          generator=generator())
    counts = Counter(found.flatten().tolist())
    assert found.shape == (4000, 2) and set(counts) == {10, 11, 99}
    assert [counts[n] / 8000 for n in (10, 11, 99)] == pytest.approx([.375, .375, .25], abs=.02)


@pytest.mark.parametrize("share, expected", [(0, {10}), (1, {99})])
def test_a_share_of_zero_or_one_leaves_no_choice(share, expected):
    found = draw_weighted(torch.tensor([[10]] * 500), torch.ones(500, 1), torch.full((500,), 99),
                          share=share, count=1, generator=generator())
    assert set(found.flatten().tolist()) == expected


def test_where_nothing_is_relevant_the_other_is_drawn():
    found = draw_weighted(torch.tensor([[10, 11]]), torch.zeros(1, 2), torch.tensor([99]), share=0,
                          count=5, generator=generator())
    assert found.tolist() == [[99] * 5]


def test_the_effective_size_counts_candidates_by_their_chances():
    assert effective_size(torch.tensor([[.25] * 4, [1, 0, 0, 0], [0] * 4])) == pytest.approx(2.5)


def test_compare_looks_at_meaning_and_surface_and_marks_empty_places():
    vectors = degrees(0, 60, 180)
    words = Words.of(["a b", "a c", "a b"], most=9)
    alike, surface = compare(vectors, words, torch.tensor([[1, 2], [0, EMPTY], [0, 1]]), bins=4,
                             chunk=2)
    assert alike[[0, 0, 1, 2], [0, 1, 0, 0]].tolist() == pytest.approx([.5, 0, .5, 0], abs=1e-6)
    assert alike[1, 1].isnan() and surface[[0, 0, 1], [0, 1, 0]].tolist() == [2, 3, 2]


# ---- all of it together ---------------------------------------------------------------------

def planted(n=300, rewritings=2, width=16):
    """Texts by chance, rewritings near their source, and pairs 2i, 2i + 1 that mean the same."""
    made = generator(3)
    x = torch.randn(n, width, generator=made)
    x[1::2] = x[::2] + .1 * torch.randn(n // 2, width, generator=made)
    vectors = torch.cat([x] + [x + .05 * torch.randn(n, width, generator=made)
                               for _ in range(rewritings)])
    rng = random.Random(0)
    texts = [" ".join(rng.choices([f"w{i}" for i in range(400)], k=8)) for _ in range(n)]
    rewritten = [text + " more" for text in texts] * rewritings
    return texts, vectors.half(), Words.of(texts + rewritten, most=32)


def test_positives_mean_the_same_and_negatives_do_not():
    texts, vectors, words = planted()
    pairs = debiased_pairs(texts, vectors, words, bins=10, twin_rate=.25, count=3, seed=1)
    assert pairs.positives.shape == pairs.negatives.shape == (300, 3)
    x = vectors.float()
    for column in range(3):
        alike = torch.cosine_similarity(x[:300], x[pairs.positives[:, column]])
        assert alike.min() > .8
        unlike = torch.cosine_similarity(x[:300], x[pairs.negatives[:, column]])
        assert unlike.max() <= pairs.limit + 1e-3 and pairs.limit < .6
    twins = (pairs.positives == torch.arange(300)[:, None]).float().mean().item()
    assert twins == pytest.approx(.25, abs=.05)


def test_what_the_rules_propose_most_is_drawn_less_often_than_without_correction():
    """8 of 10 candidates are neighbours that share hardly a word, 2 are rewritings that share 8."""
    texts, vectors, words = planted()
    share = {}
    for bins in (1, 10):
        pairs = debiased_pairs(texts, vectors, words, bins=bins, twin_rate=0., count=20, seed=1)
        share[bins] = (pairs.positives < 300).float().mean().item()
    assert share[10] < .6 * share[1]


def test_pairs_are_a_function_of_the_seed():
    texts, vectors, words = planted()
    a, b, c = (debiased_pairs(texts, vectors, words, bins=10, twin_rate=.25, count=1, seed=seed)
               for seed in (1, 1, 2))
    assert torch.equal(a.positives, b.positives) and torch.equal(a.negatives, b.negatives)
    assert not torch.equal(a.negatives, c.negatives)


def test_the_smallest_corpus_has_pairs_too():
    vectors = torch.randn(6, 4, generator=generator())
    pairs = debiased_pairs(["a b", "c d"], vectors, Words.of(["a b", "c d"] * 3, most=9), bins=10,
                           twin_rate=0., count=1, seed=0)
    assert pairs.negatives.tolist() == [[1], [0]]


def test_the_pool_of_negatives_has_its_three_sources():
    texts = [f"word{i // 2} and {i}" for i in range(300)]
    nearest = torch.arange(299).expand(300, -1)
    pool = negative_pool(texts, nearest, generator())
    assert pool.shape == (300, 32)
    assert pool[:, 16].tolist() == [i ^ 1 for i in range(300)]    # "word7" is in two texts
    assert pool[:, 24:].min() >= 49 and pool[:, 24:].max() < 200  # ranks 50 to 200


def test_the_pool_of_positives_has_its_three_sources():
    pool = positive_pool(20, 2, [0] * 20, torch.arange(19).expand(20, -1))
    assert pool[7].tolist() == [27, 47, 6, 8, *range(8)]

"""Text views: what each makes of a sentence, for every seed."""

import random

import pytest

from papers.views import (POSITIVES, crop, delete_words, flip, keep, repeat_words, swap_words,
                          switch_case, switch_case_quota)

SENTENCE = "the quick brown fox jumps over the lazy dog today"
MIXED = "When 12th Night opened (in London) the critics of 1601 were not amused"
LETTERS = [0, 2, 3, 5, 6, 7, 8, 10, 11, 12]                       # its words that begin with one


# ---- all views ------------------------------------------------------------------------------

@pytest.mark.parametrize("view", POSITIVES)
@pytest.mark.parametrize("rate", [.1, .9])
def test_every_view_is_a_function_of_sentence_and_seed_and_never_empty(view, rate):
    settings = {} if view == "dropout" else {"rate": rate}
    for text in ("word", "two words", SENTENCE):
        for seed in range(20):
            first, again = (POSITIVES[view](text, random.Random(seed), **settings)
                            for _ in range(2))
            assert first and first == again


@pytest.mark.parametrize("view", ["crop", "delete-words", "swap-words", "switch-case"])
def test_the_base_view_changes_nothing_nor_does_a_rate_of_zero(view):
    assert POSITIVES[view](MIXED, random.Random(0), rate=0.) == MIXED
    assert keep("  two\twords ", random.Random(0)) == "  two\twords "


# ---- words ----------------------------------------------------------------------------------


def test_crop_keeps_a_run_of_neighbouring_words():
    found = {crop(SENTENCE, random.Random(seed), rate=.3) for seed in range(50)}
    words = SENTENCE.split()
    assert found == {" ".join(words[start : start + 7]) for start in range(4)}


def test_deletion_drops_that_share_of_words_and_keeps_their_order():
    kept = [delete_words(SENTENCE, random.Random(seed), rate=.2).split() for seed in range(500)]
    for words in kept:
        rest = iter(SENTENCE.split())
        assert all(word in rest for word in words)
    assert sum(map(len, kept)) / 5000 == pytest.approx(.8, abs=.02)


def test_repetition_says_up_to_a_share_of_the_words_twice_in_place():
    counts = set()
    for seed in range(200):
        words, i = repeat_words(SENTENCE, random.Random(seed), rate=.32).split(), 0
        counts.add(len(words) - 10)
        for word in SENTENCE.split():
            assert words[i] == word
            i += 2 if words[i + 1 : i + 2] == [word] else 1
        assert i == len(words)
    assert counts == {0, 1, 2, 3}
    for text, possible in [("a", {"a", "a a"}), ("a b", {"a b", "a a b", "a b b", "a a b b"})]:
        assert {repeat_words(text, random.Random(seed)) for seed in range(40)} == possible


def test_swapping_moves_words_by_one_place_at_most():
    words, moved = [f"w{i}" for i in range(100)], 0
    for seed in range(50):
        found = swap_words(" ".join(words), random.Random(seed), rate=.1).split()
        assert sorted(found) == sorted(words)
        assert all(abs(found.index(word) - i) <= 1 for i, word in enumerate(words))
        moved += sum(a != b for a, b in zip(found, words))
    assert moved / 5000 == pytest.approx(2 * .1 / 1.1, abs=.02)   # a swapped pair skips one draw


# ---- switch-case ----------------------------------------------------------------------------

@pytest.mark.parametrize("word, other", [("Thebes", "thebes"), ("when", "When"), ("USA", "uSA"),
                                         ("été", "Été"), *[(same, same) for same in (
                                             "12th", "(in", "ßa", "東京", "İzmir")]])
def test_flip_changes_the_case_of_a_single_first_letter_and_back(word, other):
    assert flip(word) == other and flip(other) == word


def changed(view, sentence, seed, **settings):
    """Which words begin in another case; nothing else may differ."""
    before = sentence.split()
    after = view(sentence, random.Random(seed), **settings).split()
    assert [word.lower() for word in after] == [word.lower() for word in before]
    return [i for i, (a, b) in enumerate(zip(before, after)) if a != b]


@pytest.mark.parametrize("words, rate, quota", [(10, .05, 1), (50, .05, 2), (25, .1, 2), (1, .1, 1),
                                                (40, .1, 4)])
def test_the_quota_is_flipped_exactly_and_is_one_at_least(words, rate, quota):
    for seed in range(20):
        assert len(changed(switch_case_quota, "word " * words, seed, rate=rate)) == quota


def test_the_quota_passes_over_words_without_a_letter_and_takes_any_of_the_others():
    assert all(changed(switch_case_quota, "1 2 3 four 5", seed) == [3] for seed in range(20))
    assert changed(switch_case_quota, "1 2 (x)", 0, rate=.5) == []
    assert {i for seed in range(200) for i in changed(switch_case_quota, MIXED, seed)} == {*LETTERS}


def test_independent_flips_keep_to_their_rate():
    assert changed(switch_case, MIXED, 0, rate=1.) == LETTERS
    unchanged = sum(not changed(switch_case, "a " * 20, seed, rate=.05) for seed in range(4000))
    assert unchanged / 4000 == pytest.approx(.358, abs=.03)       # 0.95^20


@pytest.mark.parametrize("view", [switch_case, switch_case_quota])
def test_only_spaces_part_the_words_whose_case_is_switched(view):
    """A tab, a no-break space and a line's end stay; what follows them is inside a word."""
    text = "a\tb  c\u00a0d \te f\ng "
    assert view(text, random.Random(0), rate=.99) == "A\tb C\u00a0d \te F\ng"

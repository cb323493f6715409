"""Chance over seeds by hand and by SciPy; chance over pairs against a loop with SciPy's ranks."""

import numpy as np
import pytest
from scipy import stats

import significance
from eval_sts import spearman
from significance import Predictions, bootstrap, draw, holm, numbered, sign_flip_p

GOLD = [0., 1., 1., 2., 3., 4., 5., 5., 2., 3.]
GOOD = [.1, .2, .3, .3, .4, .6, .9, .8, .2, .5]
POOR = [.5, .4, .9, .1, .3, .6, .2, .8, .8, .7]


def task(ours, theirs, *, sizes=(6, 4)) -> Predictions:
    return Predictions(list(sizes), numbered(GOLD), [numbered(one) for one in ours],
                       [numbered(one) for one in theirs])


# ---- other seeds ----------------------------------------------------------------------------

@pytest.mark.parametrize("differences, p", [
    ([1., 1., 1.], 2 / 8), ([1., 1., 1., 1., 1.], 2 / 32), ([3., -1.], 1.), ([0., 0.], 1.),
    ([1., 2., -3.], 1.), ([4., 2., -1.], 4 / 8)])     # 4+2-1=5: also 4+2+1=7, and both mirrored
def test_the_sign_flip_test_counts_by_hand(differences, p):
    assert sign_flip_p(differences) == p


def test_the_sign_flip_test_equals_scipys_permutation_test():
    scipy_stats = pytest.importorskip("scipy.stats")
    differences = [.3, -.1, .5, .2, .4, -.2]
    found = scipy_stats.permutation_test((differences,), lambda x: sum(x), n_resamples=10**6,
                                         permutation_type="samples", vectorized=False)
    assert sign_flip_p(differences) == pytest.approx(found.pvalue)


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert holm([.01, .04, .03]) == pytest.approx([.03, .06, .06])
    assert holm([.5, .9]) == [1., 1.] and holm([]) == []


# ---- other pairs ----------------------------------------------------------------------------

def test_the_gain_on_the_test_itself_is_the_difference_of_spearmans():
    expected = spearman(GOOD, GOLD) - spearman(POOR, GOLD)
    assert task([GOOD], [POOR]).gain(np.ones(10)) == pytest.approx(expected)


def test_a_pair_that_occurs_more_than_once_counts_as_often():
    times = np.array([2, 0, 1, 3, 0, 1, 1, 0, 2, 0])
    gold, good, poor = (np.repeat(values, times) for values in (GOLD, GOOD, POOR))
    expected = 100 * (stats.spearmanr(good, gold)[0] - stats.spearmanr(poor, gold)[0])
    assert task([GOOD], [POOR]).gain(times.astype(float)) == pytest.approx(expected)


def test_groups_are_compared_by_the_mean_over_their_encoders():
    """Spearman of the mean over seeds, not of mean cosines."""
    alone = [task([ours], [POOR]).gain(np.ones(10)) for ours in (GOOD, GOLD)]
    assert task([GOOD, GOLD], [POOR, POOR]).gain(np.ones(10)) == pytest.approx(sum(alone) / 2)


def test_a_collapsed_encoder_scores_nothing():
    assert task([GOLD], [[.5] * 10]).gain(np.ones(10)) == pytest.approx(100)


def test_every_draw_has_the_size_of_the_test_subset_by_subset():
    times = draw([6, 4], np.random.default_rng(0))
    assert times[:6].sum() == 6 and times[6:].sum() == 4
    many = sum(draw([6, 4], np.random.default_rng(i)) for i in range(3000)) / 3000
    assert many == pytest.approx(np.ones(10), abs=.1)             # each pair as often as the others


def test_interval_and_p_equal_a_loop_over_drawn_tests():
    """Two tasks, drawn one after the other from the same generator; SciPy ranks the pairs."""
    tasks = {"a": task([GOOD], [POOR]), "b": task([POOR], [GOLD], sizes=[10])}
    rng, gains = np.random.default_rng(3), []
    for _ in range(200):
        both = []
        for ours, theirs, sizes in ((GOOD, POOR, (6, 4)), (POOR, GOLD, (10,))):
            rows, start = [], 0
            for size in sizes:
                rows += list(start + rng.integers(size, size=size))
                start += size
            gold, x, y = ([values[i] for i in rows] for values in (GOLD, ours, theirs))
            both.append(100 * (stats.spearmanr(x, gold)[0] - stats.spearmanr(y, gold)[0]))
        gains.append([*both, sum(both) / 2])
    found = bootstrap(tasks, draws=200, seed=3)
    for name, column in zip(("a", "b", "avg"), np.array(gains).T):
        _, low, high, p = found[name]
        assert [low, high] == pytest.approx(np.percentile(column, [2.5, 97.5]))
        assert p == max(1 / 200, min(1, 2 * min((column <= 0).mean(), (column >= 0).mean())))


def test_an_encoder_is_not_better_than_itself():
    assert bootstrap({"a": task([GOOD], [GOOD])}, draws=50)["avg"] == (0., 0., 0., 1.)


def test_who_is_compared_with_whom_only_turns_the_sign():
    gain, low, high, p = bootstrap({"a": task([GOOD], [POOR])}, draws=50)["a"]
    turned = bootstrap({"a": task([POOR], [GOOD])}, draws=50)["a"]
    assert turned == pytest.approx((-gain, -high, -low, p))


def test_p_is_never_below_one_in_as_many_draws():
    assert bootstrap({"a": task([GOLD], [[-value for value in GOLD]])}, draws=40)["a"][3] == 1 / 40


# ---- the program ----------------------------------------------------------------------------

def test_as_typed_it_prints_both_kinds_of_luck(tiny, pairs, capsys):
    significance.main([str(tiny), str(tiny), "--against", str(tiny), str(tiny),
                       "--test", str(pairs), "--draws", "5"])
    shown = capsys.readouterr().out
    assert "| avg" in shown and "+0.00" in shown and "1.0000" in shown
    assert "One by one: +0.00, +0.00; sign-flip test over them: p = 1.0000" in shown


@pytest.mark.parametrize("flags, code, said", [
    (["--test", "docs"], 2, "scored pairs, found docs"),
    (["--draws", "0"], 2, "expected 1 or more, found 0"),
    (["--test", "none.tsv"], 3, "expected a file of scored pairs, found nothing there")])
def test_a_wrong_use_is_refused_with_one_sentence(tiny, capsys, flags, code, said):
    with pytest.raises(SystemExit) as end:
        significance.main([str(tiny), "--against", str(tiny), *flags])
    assert end.value.code == code and said in capsys.readouterr().err

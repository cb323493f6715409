"""Tables from the records of runs, worked by hand; luck by hand, by SciPy and by a slow loop."""

import csv
import json
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from eval_sts import spearman
from tools import report
from tools.report import (Predictions, bootstrap, could_be_seen, holm, sign_flip_p, spearmans,
                          t_test)

ROOT = Path(__file__).parent.parent
GOLD = [0., 1., 1., 2., 3., 4., 5., 5., 2., 3.]
GOOD = [.1, .2, .3, .3, .4, .6, .9, .8, .2, .5]
POOR = [.5, .4, .9, .1, .3, .6, .2, .8, .8, .7]


@pytest.fixture
def run(tmp_path):
    """run(0, 60, method=...) writes the records of a finished run; returns its folder."""
    def write(seed, average, *, test="sts", **settings):
        config = {"method": "simcse", "loss": "info-nce", "positives": "dropout", "seed": seed,
                  "test": test, "out": f"runs/{seed}", "device": "auto", "threads": 0,
                  "data": ""} | settings
        folder = tmp_path / "runs" / "-".join(map(str, settings.values())) / f"seed-{seed}"
        folder.mkdir(parents=True)
        shape = {"STS-B test": {"alignment": .1, "uniformity": -2.}}
        records = {
            "args.json": {"command": f"python mincse.py --seed {seed}", "config": config},
            "env.json": {"gpu": None, "processor": "a chip", "threads": 2, "torch": "2.13"},
            "results.json": {"test": {"STS-B": average + 1, "SICK-R": average - 1, "avg": average},
                             "before": {"avg": 50.}, "dev": {"avg": 70.}, "best_step": 5,
                             "steps": 10, "geometry": shape, "geometry_before": shape}}
        for name, content in records.items():
            (folder / name).write_text(json.dumps(content))
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps({"step": step, "loss": .5, "dev": {"avg": 70.}}) + "\n" for step in (5, 10)))
        return folder
    return write


@pytest.fixture
def groups(tmp_path):
    """groups(): what the runs written so far are grouped to."""
    return lambda: report.groups_of(report.find_runs([tmp_path]))


@pytest.fixture
def said(tmp_path, capsys):
    """said(): what the program prints of the runs written so far."""
    def typed():
        report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
        return capsys.readouterr().out
    return typed


# ---- groups ---------------------------------------------------------------------------------

def test_seeds_of_one_experiment_are_one_group_wherever_they_ran(run, groups):
    run(0, 60.), run(1, 61., data="elsewhere", threads=1)
    group, = groups()
    assert group.name == "simcse" and group.averages == {0: 60., 1: 61.}


def test_a_group_is_named_after_what_tells_it_from_its_likes(run, groups):
    run(0, 60., steps=10), run(0, 61., steps=20), run(0, 62., method="is-cse", loss="focal")
    assert sorted(group.name for group in groups()) == [
        "is-cse focal", "simcse, steps 10", "simcse, steps 20"]


def test_simcse_stands_first_also_with_settings_in_its_name(run, groups):
    run(0, 60., method="cards"), run(0, 61., learning_rate=1e-5)
    assert groups()[0].name == "simcse"
    run(0, 61., learning_rate=3e-5)
    assert groups()[0].name == "simcse, learning_rate 1e-05"


def test_what_a_method_does_not_read_and_what_an_older_version_lacked_tells_nothing_apart(
        run, groups):
    """Older records have the settings of all methods, and some that are gone."""
    run(0, 60., corpus=["x/wiki.txt", "y/reviews.txt"]), run(0, 61., corpus="x/wiki.txt")
    run(1, 62., corpus="x/wiki.txt", order="in-turn", retrieved=3)
    run(0, 64., corpus="x/wiki.txt", steps=3)
    assert {group.name: list(group.averages) for group in groups()} == {
        "simcse, corpus wiki.txt reviews.txt, steps 0": [0],
        "simcse, corpus wiki.txt, steps 0": [0, 1], "simcse, corpus wiki.txt, steps 3": [0]}


def test_what_is_not_finished_or_of_another_program_is_named_and_left_out(run, groups, capsys):
    run(0, 60.)
    (run(1, 61.) / "results.json").unlink()
    assert len(groups()[0].runs) == 1
    assert "seed-1 is not in the table: it has no results.json" in capsys.readouterr().err


# ---- what is written ------------------------------------------------------------------------

def test_the_table_by_hand_compares_the_seeds_that_both_have(run, groups):
    """Differences 2, 1, 3: mean 2, s 1, standard error 1 / √3; t with 2 degrees of freedom is
    2√3 = 3.464, whose p is 0.074, and reaches 4.303 / √3 = 2.484 to either side."""
    for seed in range(3):
        run(seed, 60. + seed), run(seed, [62., 62., 65.][seed], method="cards")
    found = groups()
    assert report.table_of(found, found[0]) == [
        ["", "seeds", "steps", "STS-B", "SICK-R", "average", "against simcse", "95 % interval",
         "p (t, Holm)", "p (exact)"],
        ["simcse", "3", "10", "62.00", "60.00", "61.00 ± 1.00", "", "", "", ""],
        ["cards", "3", "10", "64.00", "62.00", "63.00 ± 1.73", "+2.00", "-0.48 to +4.48", "0.074",
         "0.250"]]
    run(7, 99., method="cards")
    assert report.paired(*groups()[::-1]) == [2., 1., 3.]


def test_a_single_seed_in_common_says_nothing_and_several_say_what_could_have_been_seen(
        run, groups):
    run(0, 60.), run(0, 61., method="cards")
    found = groups()
    assert report.table_of(found, found[0])[2][6:] == ["+1.00", "-inf to +inf", "1.000", "1.000"]
    assert "could have been seen" not in report.as_markdown(found, found[0])
    for seed in (1, 2):
        run(seed, 60.), run(seed, 61. + seed, method="cards")
    found = groups()
    assert "could have been seen is 3.10" in report.as_markdown(found, found[0])


def test_the_program_writes_tables_and_figures(run, said, tmp_path):
    pytest.importorskip("matplotlib")
    for seed in range(3):
        run(seed, 60. + seed)
    out, shown = tmp_path / "out", said()
    assert (out / "results.md").read_text() == shown[:-1]
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["seed"], row["avg"], row["command"]) for row in rows] == [
        (str(i), f"{60 + i}.0", f"python mincse.py --seed {i}") for i in range(3)]
    assert all((out / f"{name}.png").stat().st_size > 1000
               for name in ("averages", "dev", "geometry"))


def test_the_curve_of_a_pre_training_starts_before_the_first_step_and_ends_at_the_last(
        said, tmp_path):
    pytest.importorskip("matplotlib")
    for name, last in (("svd", 4.), ("random", 5.)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "args.json").write_text('{"config": {"mask_rate": 0.2}, "command": "python"}')
        (folder / "env.json").write_text("{}")
        (folder / "metrics.jsonl").write_text(
            '{"tokens": 2000000, "loss": 9}\n{"tokens": 4000000, "held_out_loss": 6.0}\n'
            f'{{"tokens": 5000000, "held_out_loss": {last}}}\n')
        (folder / "results.json").write_text(json.dumps(
            {"before": {"held_out_loss": 9.5}, "test": {"held_out_loss": last}}))
    expected = [(0, 9.5), (4., 6.0), (5., 4.0)]
    assert report.curve(report.read_run(tmp_path / "runs" / "svd")) == expected
    assert "| random |            5.0 |         5.000 |" in said()
    assert (tmp_path / "out" / "pretraining.png").stat().st_size > 1000


def test_it_reads_what_a_real_run_left(program, said, tmp_path, capsys):
    program(out="runs/real/seed-0", seed=0)
    capsys.readouterr()
    found = json.loads((tmp_path / "runs/real/seed-0/results.json").read_text())["test"]
    assert f"{found['avg']:.2f}" in said()


@pytest.mark.parametrize("folders", [["study"], ["long"],
                                     ["next-door/supervised", "next-door/core-tuning"]])
def test_the_tables_of_the_page_are_made_from_the_records_in_results(folders):
    groups = report.groups_of(report.find_runs([ROOT / "results" / each for each in folders]))
    table = report.as_markdown(groups, report.pick_baseline(groups, "")).split("\n\n")[0]
    assert table in (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8")


def test_the_average_that_is_told_in_a_sentence_is_that_of_the_records():
    group, = report.groups_of(report.find_runs([ROOT / "results" / "long" / "simcse"]))
    average = report.spread(list(group.averages.values()))
    assert all(average in (ROOT / page).read_text(encoding="utf-8")
               for page in ("README.md", "mini/README.md", "docs/RESULTS.md"))


def test_the_table_of_the_search_has_the_means_of_its_seeds():
    found, page = {}, (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8")
    for row in csv.DictReader((ROOT / "results/search.csv").open()):
        setting = found.setdefault(row["run"], {}).setdefault(
            (row["learning_rate"], row["temperature"]), [])
        setting.append(float(row["dev"]))
    for name, scores in found.items():
        cells = [f"{np.mean(scores[rate, temperature]):.2f}"
                 for rate in ("5e-5", "2e-4") for temperature in ("0.05", "0.03")]
        line = " | ".join(["", name, *cells, ""]).strip()
        assert line in page.replace("**", ""), line


def test_the_table_of_the_encoders_has_the_averages_of_their_runs():
    page = (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8")
    for encoder in ("mini", "svd", "random", "dropout"):
        rows = [row for row in csv.DictReader((ROOT / "results/pretrain/after.csv").open())
                if row["encoder"] == encoder and row["average"]]
        assert " | ".join([rows[0]["raw_average"], *(row["average"] for row in rows)]) in page


@pytest.mark.parametrize("group, file, places", [
    *(("fed-" + name, "metrics.jsonl",
       [(-1, "drift", 3), (-1, "same_class_cosine", 3), (-1, "between_class_cosine", 3),
        (-1, "participation_ratio", 1), (0, "dev", "avg", 2), (-1, "dev", "avg", 2)])
      for name in ("ce", "scl", "rcl")),
    *(("seq-" + name, "results.json",
       [*(("matrix", "after reviews8k", c, 2) for c in ("wiki8k", "reviews8k", "test")),
        ("forgetting", 2), ("average", 2)])
      for name in ("finetuning", "distillation", "pseudo", "pnr")),
    *(("pruned", "results.json", [("rows", f"{criterion}-{removed}", "average", 2)
                                  for criterion in ("contribution", "signed", "random")])
      for removed in (30, 50, 70)),
    ("together", "results.json", [("test", "avg", 2)])])
def test_the_lines_of_the_papers_next_door_have_mean_and_deviation_of_three_seeds(
        group, file, places):
    """A place is the keys of a number in a record, then the digits shown."""
    texts = [path.read_text() for path in (ROOT / "results/next-door" / group).glob(f"*/{file}")]
    records = [[*map(json.loads, text.splitlines())] if file.endswith("l") else json.loads(text)
               for text in texts]
    line = " | ".join(report.spread([reduce(getitem, keys, record) for record in records], digits)
                      for *keys, digits in places)
    assert len(records) == 3 and line in (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8")


def test_the_averages_after_longer_training_are_those_of_their_seeds():
    found, page = {}, (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8")
    for row in csv.DictReader((ROOT / "results/longer/seven.csv").open()):
        found.setdefault(row["run"], []).append(float(row["avg"]))
    assert len(found) == 3 and all(report.spread(averages) in page for averages in found.values())


# ---- luck with seeds ------------------------------------------------------------------------

@pytest.mark.parametrize("differences, p", [
    ([1., 1., 1.], 2 / 8), ([3., -1.], 1.), ([0., 0.], 1.),
    ([4., 2., -1.], 4 / 8)])                          # 4+2-1=5: also 4+2+1=7, and both mirrored
def test_the_sign_flip_test_counts_by_hand_and_equals_scipys(differences, p):
    longer = [.3, -.1, .5, .2, .4, -.2]
    found = stats.permutation_test((longer,), sum, n_resamples=10**6, permutation_type="samples",
                                   vectorized=False)
    assert sign_flip_p(differences) == p and sign_flip_p(longer) == pytest.approx(found.pvalue)


@pytest.mark.parametrize("differences", [[1., 2., 3.], [.3, -.1, .5, .2, .4, -.2], [4., -4.]])
def test_p_and_interval_of_the_t_test_are_scipys(differences):
    found = stats.ttest_1samp(differences, 0)
    assert t_test(differences) == pytest.approx(
        (found.pvalue, *found.confidence_interval(.95)))


def test_differences_that_are_the_same_for_every_seed_are_certain_and_none_at_all_is_none():
    assert t_test([2., 2., 2.]) == (0., 2., 2.) and t_test([0., 0.]) == (1., 0., 0.)


def test_the_smallest_difference_that_could_have_been_seen_by_hand_and_by_repeating_the_study():
    """Variances 1 (2 degrees of freedom) and 4 (4): s² = (2 + 16) / 6 = 3, and the fewer seeds are
    3, so (4.303 + 1.061) √3 / √3 = 5.36. Of studies where s is 3 and 5.36 · √3 true, 80 % see it.
    """
    said = could_be_seen([[0., 1., 2.], [-2., -2., 0., 2., 2.], [7.]])
    assert "With 3 paired seeds" in said and "deviate by 1.73" in said and "is 5.36 (" in said
    studies = np.random.default_rng(0).normal(5.364, 3 ** .5, (2000, 3))
    seen = np.mean([t_test(study.tolist())[0] < .05 for study in studies])
    assert seen == pytest.approx(.8, abs=.05)


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert holm([.01, .04, .03]) == pytest.approx([.03, .06, .06])
    assert holm([.5, .9]) == [1., 1.] and holm([]) == []


# ---- luck with pairs of sentences -----------------------------------------------------------

def task(ours, theirs, *, sizes=(6, 4)) -> Predictions:
    return Predictions(list(sizes), *map(np.array, (GOLD, ours, theirs)))


def test_the_gain_is_the_difference_of_mean_spearmans_over_the_encoders_of_each_side():
    """Mean of Spearmans, not Spearman of mean cosines; a side may have more encoders."""
    expected = spearman(GOOD, GOLD) - spearman(POOR, GOLD)
    assert task([GOOD], [POOR]).gain() == pytest.approx(expected)
    both = (spearman(GOOD, GOLD) + spearman(GOLD, GOLD)) / 2 - spearman(POOR, GOLD)
    assert task([GOOD, GOLD], [POOR]).gain() == pytest.approx(both)


def test_a_collapsed_encoder_scores_nothing():
    assert spearmans(np.array(GOLD), np.array([GOLD, [.5] * 10])) == pytest.approx([1, 0])


def test_every_draw_has_the_size_of_the_test_subset_by_subset():
    rng = np.random.default_rng(0)
    draws = np.array([task([GOOD], [POOR]).draw(rng) for _ in range(3000)])
    assert ((draws[:, :6] < 6) & (draws[:, :6] >= 0)).all() and (draws[:, 6:] >= 6).all()
    assert np.bincount(draws.flatten()) / 3000 == pytest.approx(np.ones(10), abs=.1)


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


def test_nothing_is_gained_by_an_equal_turning_changes_the_sign_and_p_is_at_least_one_draw():
    assert bootstrap({"a": task([GOOD], [GOOD])}, draws=50)["avg"] == (0., 0., 0., 1.)
    gain, low, high, p = bootstrap({"a": task([GOOD], [POOR])}, draws=50)["a"]
    turned = bootstrap({"a": task([POOR], [GOOD])}, draws=50)["a"]
    assert turned == pytest.approx((-gain, -high, -low, p))
    opposite = [-value for value in GOLD]
    assert bootstrap({"a": task([GOLD], [opposite])}, draws=40)["a"][3] == 1 / 40


def test_as_typed_it_prints_gain_interval_and_p(tiny, pairs, capsys):
    report.main([str(tiny), str(tiny), "--against", str(tiny), str(tiny), "--test", str(pairs),
                 "--draws", "5"])
    shown = capsys.readouterr().out
    assert "| avg   | +0.00 | +0.00 | +0.00 | 1.0000 |" in shown


# ---- what is refused ------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, code, text", [
    ("results.json", "{", 3, "expected the records of a run"),
    ("args.json", '{"config": 3, "command": ""}', 3, "expected the records of a run"),
    ("env.json", None, 3, "it has no env.json"), ("args.json", None, 3, "expected a finished run")])
def test_damaged_records_end_with_a_sentence(run, tmp_path, capsys, name, content, code, text):
    path = run(0, 60.) / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(SystemExit) as refused:
        report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert refused.value.code == code and text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, code, text", [
    (["no/such"], 3, "found no folder there"),
    (["RUNS/x", "--baseline", "cards"], 2, "expected one of 'simcse"),
    (["RUNS"], 2, "the same --test, found sts in "),
    (["RUNS/x", "RUNS/x"], 2, "found a seed twice with the same settings"),
    (["TINY", "--against", "TINY", "--test", "docs"], 2, "scored pairs, found docs"),
    (["TINY", "--against", "TINY", "--draws", "0"], 2, "expected 1 or more, found 0"),
    (["TINY", "--against", "TINY", "--test", "none.tsv"], 3, "found nothing there")])
def test_a_wrong_use_is_refused_with_one_sentence(run, tiny, tmp_path, capsys, flags, code, text):
    run(0, 60., corpus="x"), run(1, 60., test="docs", corpus="y")
    typed = [flag.replace("RUNS", str(tmp_path / "runs")).replace("TINY", str(tiny))
             for flag in flags]
    with pytest.raises(SystemExit) as refused:
        report.main([*typed, "--out", str(tmp_path / "out")])
    assert refused.value.code == code and text in capsys.readouterr().err

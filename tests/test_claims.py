"""A mechanism does what docs/CLAIMS.md says, also at a smaller size; no paper is without."""

import re
from importlib import import_module
from math import isfinite
from statistics import mean

import pytest

from claims import Found, Shows, Trial, draw, find, p_value
from claims.__main__ import NAMES
from claims.planted import meanings, opposite, pair_scores, say
from conftest import ROOT
from papers import METHODS

CLAIMS = (ROOT / "docs" / "CLAIMS.md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", CLAIMS, re.M | re.S))


def shown(name: str) -> list[Shows]:
    """The statements of a page that docs/CLAIMS.md calls shown, but for small differences."""
    found = re.findall(r"- shown: (.+), \*(.+)\* above \*(.+)\* by (\S+) ", PARTS[name])
    return [Shows(*words) for *words, by in found if float(by) >= .05]


def test_every_paper_has_a_claim_and_every_claim_its_part_of_the_page():
    assert {name.replace("-", "_") for name in METHODS} | {"focal", "sparsecse"} <= set(NAMES)
    assert [*PARTS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_page_repeats_the_claim_as_it_is_written_today(name):
    page = import_module(f"claims.{name}")
    assert page.__doc__.strip() in PARTS[name]
    for column, more, less in page.SHOWS:
        assert f"{column}, *{more}* above *{less}* by" in PARTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_measures_and_what_was_shown_points_the_same_way_at_a_smaller_size(name):
    page, again = import_module(f"claims.{name}"), shown(name)
    found = find(page, [0], size=.3 if again else .1)
    assert all(isfinite(mean(found.differences(statement))) for statement in page.SHOWS)
    for statement in again:
        assert mean(found.differences(statement)) > 0, f"{statement}\n{found.table()}"


def test_the_picture_of_focal_crosses_from_the_far_negatives_to_the_close_ones(tmp_path):
    pytest.importorskip("matplotlib")
    page = import_module("claims.focal")
    found = page.curves(Trial(0))
    (_, far), *_, (_, near) = found.points["info-nce"]
    (_, focal_far), *_, (_, focal_near) = found.points["focal"]
    assert focal_far < far and focal_near > near
    draw(page, Trial(0), tmp_path / "focal.png")
    assert (tmp_path / "focal.png").read_bytes().startswith(b"\x89PNG")


def test_p_is_that_of_a_paired_t_test():
    """t = mean / (s / √n) = 2 / (1 / √3) = 3.464 with 2 degrees of freedom: p = 0.0742."""
    assert p_value([1, 2, 3]) == pytest.approx(.0742, abs=1e-4)
    assert p_value([0, 0, 0]) == 1 and p_value([1, 1, 1]) == 0


def test_a_statement_holds_if_the_difference_has_its_sign_and_is_no_luck():
    def found(*values):
        page = type("Page", (), {"SHOWS": [Shows("x", "a", "b")]})
        return Found(page, [{"a": {"x": value}, "b": {"x": 0.0}} for value in values], seconds=0)
    assert found(2.0, 2.1, 1.9).held == "1 of 1"
    assert {found(-2.0, -2.1, -1.9).held, found(3.0, -1.0, 0.5).held} == {"0 of 1"}


def test_labels_are_scored_by_the_pairs_that_they_join():
    """Joined: (0, 1), (0, 2), (1, 2); true: (0, 1), (2, 3). 1 of 3 is right, 1 of 2 is found."""
    import torch
    scores = pair_scores(torch.tensor([5, 5, 5, -1, -1]), torch.tensor([0, 0, 1, 1, 2]))
    assert scores == {"precision": pytest.approx(1 / 3), "recall": pytest.approx(1 / 2)}


def test_wordings_share_no_word_of_content_and_opposites_all_but_the_verb():
    rng = Trial(0).rng
    for meaning in meanings(50, rng):
        first, last = (set(re.findall(r"\w+", say(meaning, w).lower())) for w in (0, 31))
        assert first & last <= {"the", "is", "by", "in", "on", "at", "for"}
        other = set(re.findall(r"\w+", say(opposite(meaning), 0).lower()))
        assert len(first - other) == 1 and opposite(opposite(meaning)) == meaning

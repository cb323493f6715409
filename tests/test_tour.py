"""docs/TOUR.md: what it prints is what it says, and the lines that it quotes stand on the pages."""

import doctest
import re

import pytest
import torch

from conftest import ROOT
from papers import METHODS

TOUR = (ROOT / "docs" / "TOUR.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d*")


class AboutEqual(doctest.OutputChecker):
    """Decimals may differ by 5 % or two units of their last digit, as processors round."""

    def check_output(self, want, got, optionflags):
        if NUMBER.sub("#", want).split() != NUMBER.sub("#", got).split():
            return False
        return all(float(found) == pytest.approx(float(said), rel=.05,
                                                 abs=2.1 * 10 ** -len(said.partition(".")[2]))
                   for said, found in zip(NUMBER.findall(want), NUMBER.findall(got)))


def test_numbers_may_differ_in_their_last_digits_and_nothing_else():
    check = AboutEqual().check_output
    assert check("loss 0.70", "loss 0.72", 0) and not check("loss 0.70", "loss 0.75", 0)
    assert not check("2 rows", "3 rows", 0) and not check("True", "False", 0)


def test_every_stop_prints_what_the_page_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.sub(r"^```.*$", "", TOUR, flags=re.M)
    test = doctest.DocTestParser().get_doctest(code, {}, "TOUR.md", None, 0)
    assert len(test.examples) > 40
    found = []
    try:
        doctest.DocTestRunner(AboutEqual(), verbose=False).run(test, out=found.append)
    finally:
        torch.set_printoptions(profile="default")
    assert not found, "".join(found)


@pytest.mark.parametrize("page, line", re.findall(
    r"\(\.\./papers/(\w+)\.py\)(?:(?!\n\n).)*\n\n    ([^\n]+)\n", TOUR, re.S))
def test_a_line_that_is_quoted_stands_on_its_page(page, line):
    text = (ROOT / "papers" / f"{page}.py").read_text(encoding="utf-8")
    assert line in " ".join(text.split()), f"papers/{page}.py has no {line}"


def test_every_paper_has_its_stop_with_the_command_of_its_claim():
    for name in [*METHODS, "focal", "sparsecse"]:
        assert f"    python -m claims.{name.replace('-', '_')}\n" in TOUR

"""The exercises: a stub fails its test, its solution passes, and the page tells of each."""

import re
import sys

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "docs" / "exercises"))
import exercises                                                  # noqa: E402
import solutions                                                  # noqa: E402
import test_yours                                                 # noqa: E402

TESTS = [name for name in vars(test_yours) if re.match(r"test_\d\d_", name)]


@pytest.mark.parametrize("name", TESTS)
def test_a_stub_fails_its_test_and_the_solution_passes(name, monkeypatch):
    monkeypatch.setattr(test_yours, "yours", exercises)
    with pytest.raises((NotImplementedError, TypeError)):
        vars(test_yours)[name]()
    monkeypatch.setattr(test_yours, "yours", solutions)
    vars(test_yours)[name]()


def test_the_page_has_the_ten_in_order_each_by_the_names_of_its_stubs():
    page = (ROOT / "docs/EXERCISES.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## (?=\d)", page, flags=re.M)
    assert [int(section.split(".")[0]) for section in sections] == list(range(1, 11))
    assert [name[5:7] for name in TESTS] == [f"{number:02d}" for number in range(1, 11)]
    stubs = [value for value in vars(exercises).values()
             if getattr(value, "__module__", "") == "exercises"]
    for stub in stubs:
        assert f"`{stub.__name__}`" in sections[int(stub.__doc__[:2]) - 1]
        assert stub.__name__ in vars(solutions)

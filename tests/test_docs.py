"""From docstrings to sentences, on examples made up here and on the packages that are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import read_corpus
from engine import docs
from engine.docs import doc_sentences, doc_twins, folded, is_sentence, paragraphs, without_markup

ROOT = Path(__file__).parent.parent


# ---- cleaning -------------------------------------------------------------------------------

@pytest.mark.parametrize("markup, text", [
    ("Like :func:`~torch.add` and :attr:`dim`.", "Like torch.add and dim."),
    ("Set ``True`` or `None`, *never* **both**.", "Set True or None, never both."),
    ("As shown in [1]_, see `the guide <http://x.org/a>`_.", "As shown in, see the guide."),
    (r"An :math:`n \times m` matrix.", r"An n \times m matrix."),
    ("Two\n  lines.", "Two lines."),
    ("The product 2 * 3 * 4 is not emphasis.", "The product 2 * 3 * 4 is not emphasis."),
])
def test_markup_goes_and_words_stay(markup, text):
    assert without_markup(markup) == text


EXAMPLE = '''
    owl(x, *,
        loud=False) -> Tensor

    Hoots at every element of :attr:`x`.  Owls hoot,
    e.g. Strix aluco, at night.

    Parameters
    ----------
    x : array
        This is indented, so it is part of a list.

    >>> This looks like a sentence of a session.

    .. note:: This is a directive of the markup.

    The last paragraph is prose again.
    It may mention hoot(x)

    or not.
    '''


def test_only_prose_at_the_margin_is_read_and_no_signature():
    sentences = [sentence for paragraph in paragraphs(EXAMPLE)
                 for sentence in docs.SENTENCE_END.split(paragraph) if sentence]
    assert sentences == ["Hoots at every element of x.",
                         "Owls hoot, e.g. Strix aluco, at night.",
                         "The last paragraph is prose again.", "It may mention hoot(x)", "or not."]


@pytest.mark.parametrize("text, verdict", [
    ("Return the owls of an array.", True),
    ("return the owls of an array.", False),            # the middle of something
    ("Return the owls of an array", False),             # a heading, or cut off
    ("The owl.", False),                                # too short
    ("The " + "owl " * 70 + "ends.", False),            # too long
    ("Set x = y + z for the a_b of it.", False),        # code
    ("Owls hoot loudly nightly.", False),               # no small word: often a list of terms
])
def test_what_counts_as_a_sentence(text, verdict):
    assert is_sentence(text) == verdict


# ---- what is on this machine ----------------------------------------------------------------

def test_the_corpus_has_20_to_50_thousand_sentences_and_no_two_are_equal():
    sentences = doc_sentences()
    assert 20_000 <= len(sentences) <= 50_000
    assert len({folded(sentence) for sentence in sentences}) == len(sentences)
    assert all(map(is_sentence, sentences))
    corpus = read_corpus("docs")
    assert corpus.columns == [sentences] and corpus.documents is None


def test_the_corpus_holds_no_sentence_of_the_test():
    test = {folded(sentence) for _, *pair in doc_twins() for sentence in pair}
    assert test.isdisjoint(map(folded, doc_sentences()))


def test_twins_are_two_clean_descriptions_of_one_function_and_none_occurs_twice():
    twins = doc_twins()
    sides = [folded(sentence) for _, *pair in twins for sentence in pair]
    assert 150 <= len(twins) <= 400
    assert len(set(sides)) == len(sides) == 2 * len(twins)
    assert len({name for name, *_ in twins}) == len(twins)
    assert {"argsort", "inv", "fft", "hann", "erf"} <= {name for name, *_ in twins}
    for name, *pair in twins:
        for sentence in pair:
            assert not any(mark in sentence for mark in ("`", "\\", "->", "\n", "Alias for"))
            assert not sentence.startswith(f"{name}(") and not sentence.endswith(":")


def test_a_name_that_means_two_things_makes_no_twins():
    twins = {name: pair for name, *pair in doc_twins()}
    assert not {"select", "typename", "bernoulli", "polar"} & set(twins)
    assert "condition number" in twins["cond"][0]               # torch.cond is a branch


# ---- the cache, and another process ---------------------------------------------------------

def test_the_second_time_the_cache_answers_and_a_damaged_one_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, calls = ["An elk is here."], []
    monkeypatch.setattr(docs, "find_sentences", lambda: calls.append(1) or found)
    ask = docs.doc_sentences.__wrapped__                          # without the process's own memory
    assert ask() == ask() == found and len(calls) == 1
    [kept] = tmp_path.rglob("*.json")
    kept.write_text('["An elk')
    assert ask() == ask() == found and len(calls) == 2


def test_another_process_with_no_place_for_a_cache_finds_the_same_in_the_same_order(tmp_path):
    (tmp_path / "a file").write_text("where a folder should be")
    script = ("import json; from engine.docs import *\n"
              "print(json.dumps([doc_sentences(), doc_twins()]))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONHASHSEED": "7",
                                            "XDG_CACHE_HOME": str(tmp_path / "a file")})
    assert done.returncode == 0, done.stderr
    sentences, twins = json.loads(done.stdout)
    assert sentences == doc_sentences() and [tuple(twin) for twin in twins] == doc_twins()


def test_python_without_docstrings_is_told_why_it_finds_none():
    done = subprocess.run([sys.executable, "-OO", "-c", "from engine.docs import *; doc_twins()"],
                          cwd=ROOT, capture_output=True, text=True)
    assert "ValueError" in done.stderr and "run python without -OO" in done.stderr

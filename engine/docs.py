"""
What English is on every user's machine? The documentation of numpy, scipy and torch.

    doc_sentences()   some ten thousand sentences from the docstrings: a corpus without a download
    doc_twins()       (name, torch's sentence, numpy's or scipy's): a test without a download

Functions of one name in two libraries are described by different people: two paraphrases. The
corpus is read from the source, where a docstring is a string in triple quotes, and lacks the
sentences of the test. Both depend on the versions of the three packages, so that scores compare
only within one installation.
"""

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from engine.files import write_text

PACKAGES = ("numpy", "scipy", "torch")
NOT_READ = {"tests", "testing", "_vendor", "distutils"}         # folders of no use to users

# Modules where a name means the same, but for the false friends. The first pair that has it counts.
SIBLINGS = [
    ("torch", "numpy"), ("torch.linalg", "numpy.linalg"), ("torch.linalg", "scipy.linalg"),
    ("torch.fft", "numpy.fft"), ("torch.fft", "scipy.fft"), ("torch.special", "scipy.special"),
    ("torch.nn.functional", "scipy.special"), ("torch.signal.windows", "scipy.signal.windows"),
]
FALSE_FRIENDS = {"select", "typename"}

# A line that is not prose: indented, a code example, a directive, an item, a rule, a table, a call.
NOT_PROSE = re.compile(r"^(?:\s|>>>|\.\. |[-*] |[-=~*^|+]{2}|[\w.]+\(.*\)$)", re.MULTILINE)

# `add(input, other) -> Tensor`, on one line or more: functions written in C begin with these.
SIGNATURES = re.compile(r"\A(?:[\w.]+\((?:.*[,)]|.*->.*)\n(?: +.*\n)*\n*)+")

SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)(?<!\bcf\.)(?<!\b[Ff]ig\.)(?<!\b[Ee]q\.)"
    r"(?<!\b[A-Z]\.)\s+(?=[\"'(]?[A-Z]|torch\.)")

MARKUP = [(re.compile(pattern), instead) for pattern, instead in [
    (r"\s*\[\w+\]_", ""),                             # a footnote
    (r":[\w:]+:`~?([^`]*)`", r"`\1`"),                # a role, as in :func:`~torch.add`
    (r"`([^`<]+?)\s*<[^`>]*>`_*", r"\1"),             # `words <address>`_
    (r"`+([^`]*)`+_*", r"\1"),                        # `name` and ``code``
    (r"(\*\*?)([^\s*](?:[^*]*[^\s*])?)\1", r"\2"),    # *emphasis* and **more**
    (r"\\(?:text|mathrm|mathbf)\{([^}]*)\}", r"\1"),  # words within formulas
    (r"\s+", " "),
]]

SMALL_WORDS = set("a an and are as at be by for from if in is it not of on or that the this to "
                  "when which with you".split())


def paragraphs(docstring: str) -> list[str]:
    """The paragraphs as the rendered page shows them; "" for one that is not prose."""
    text = SIGNATURES.sub("", inspect.cleandoc(docstring) + "\n")
    return ["" if NOT_PROSE.search(paragraph) else without_markup(paragraph)
            for paragraph in re.split(r"\n\s*\n", text)]


def without_markup(text: str) -> str:
    """reST without its markup."""
    for pattern, instead in MARKUP:
        text = pattern.sub(instead, text)
    return text.strip()


def is_sentence(text: str) -> bool:
    """4 to 60 words from a capital to a full stop, mostly letters, a small word among them."""
    words = text.lower().split()
    letters = sum(letter.isalpha() or letter == " " for letter in text)
    return (4 <= len(words) <= 60 and text[0].isupper() and text[-1] in ".!?"
            and letters > 0.85 * len(text) and not re.search(r"[{}\\|=<>_@#$]| [,.;:)]", text)
            and not SMALL_WORDS.isdisjoint(words))


def folded(sentence: str) -> str:
    """The letters and digits of a sentence, in lower case, by which copies of it are found."""
    return re.sub(r"[\W_]+", " ", sentence).strip().lower()


def docstrings() -> Iterator[str]:
    """Every string in triple quotes in the source of the packages."""
    for package in PACKAGES:
        root = Path(find_spec(package).submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            if NOT_READ.isdisjoint(path.relative_to(root).parts):
                source = path.read_text(encoding="utf-8", errors="replace")
                yield from re.findall(r'"""(.*?)"""', source, re.DOTALL)


@cache
def doc_sentences() -> list[str]:
    """The sentences of all docstrings; six seconds of work, so the user's cache keeps them."""
    versions = " ".join(version(package) for package in PACKAGES)
    name = f"{sha256(versions.encode() + Path(__file__).read_bytes()).hexdigest()[:16]}.json"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mincse", name)
    try:
        return json.loads(kept.read_bytes())
    except (OSError, ValueError):
        sentences = find_sentences()
        with suppress(OSError):                                   # no place to write: do without
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(sentences))
        return sentences


def find_sentences() -> list[str]:
    """The sentences of all docstrings, each once, without those of the twins."""
    known = {folded(sentence) for _, *pair in doc_twins() for sentence in pair}
    found = {}
    for docstring in docstrings():
        for paragraph in paragraphs(docstring):
            for sentence in filter(is_sentence, SENTENCE_END.split(paragraph)):
                found.setdefault(folded(sentence), sentence)
    return [sentence for key, sentence in found.items() if key not in known]


@cache
def doc_twins() -> list[tuple[str, str, str]]:
    """How torch and numpy, or scipy, describe each function that they share.

    No sentence occurs twice, so that every question has one right answer.
    """
    if sys.flags.optimize > 1:
        raise ValueError("the built-in test is made of docstrings: run python without -OO")
    twins, seen = {}, set()
    for torch_module, other_module in SIBLINGS:
        ours, theirs = importlib.import_module(torch_module), importlib.import_module(other_module)
        for name in sorted(set(dir(ours)) & set(dir(theirs)) - FALSE_FRIENDS - set(twins)):
            pair = first_sentence(getattr(ours, name)), first_sentence(getattr(theirs, name))
            keys = {folded(sentence) for sentence in pair}
            if all(pair) and len(keys) == 2 and keys.isdisjoint(seen):
                twins[name] = pair
                seen |= keys
    return [(name, *pair) for name, pair in twins.items()]


def first_sentence(function: object) -> str:
    """The first sentence of its docstring; "" if that is no description, or needs a formula."""
    if not callable(function) or inspect.isclass(function) or not function.__doc__:
        return ""
    sentence = SENTENCE_END.split(paragraphs(function.__doc__)[0])[0]
    return "" if re.search(r"^Alias |[\\{}]|:$", sentence) else sentence

"""
Texts whose truth is known, and how well it was found again.

    copies                  a text and changed copies of it, with words swapped and dropped
    meanings, say           sentences of a small grammar: 32 wordings of each of 24,000 meanings
    opposite                the same words, but for a verb that says the contrary
    pair_scores             are those that share a label those that share a meaning?
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from papers.views import delete_words, swap_words

WHO = [words.split() for words in (
    "doctor physician, child kid, teacher instructor, soldier warrior, farmer grower, "
    "thief robber, king monarch, writer author, sailor seaman, lawyer attorney, priest clergyman, "
    "student pupil").split(", ")]
WHAT = [words.split() for words in (
    "car automobile, house home, ship vessel, picture image, letter message, road street, "
    "stone rock, shop store, gift present, coat jacket, film movie, forest wood").split(", ")]
WHERE = [words.split(" / ") for words in (
    "in the city / in town, near the river / by the stream, at night / after dark, "
    "on the hill / on the mountain, in the morning / at dawn, at the market / at the fair, "
    "for free / without pay, in autumn / in the fall").split(", ")]
# Present and past participle, in two words; of two neighbours each says the contrary of the other.
DOES = [words.split() for words in (
    "buys bought purchases purchased, sells sold markets marketed, "
    "opens opened unlocks unlocked, closes closed shuts shut, "
    "praises praised admires admired, criticizes criticized blames blamed, "
    "builds built constructs constructed, destroys destroyed demolishes demolished, "
    "finds found discovers discovered, loses lost misplaces misplaced, "
    "loves loved adores adored, hates hated despises despised, "
    "accepts accepted approves approved, rejects rejected refuses refused, "
    "remembers remembered recalls recalled, forgets forgotten neglects neglected, "
    "protects protected defends defended, attacks attacked damages damaged, "
    "shows shown displays displayed, hides hidden conceals concealed").split(", ")]
FRAMES = ["the {who} {does} the {what} {where}.", "{where}, the {what} is {done} by the {who}."]


class Meaning(NamedTuple):
    """Places in WHO, DOES, WHAT and WHERE."""
    who: int
    does: int
    what: int
    where: int


def meanings(count: int, rng: random.Random) -> list[Meaning]:
    """Different ones, of the 23,040 that there are."""
    lists = (WHO, DOES, WHAT, WHERE)
    found = {}
    while len(found) < count:
        found.setdefault(Meaning(*(rng.randrange(len(words)) for words in lists)))
    return list(found)


def say(meaning: Meaning, wording: int) -> str:
    """A meaning in words; of the wordings 0 to 31, w and 31 - w share no word but "the"."""
    who, does, what, where, frame = (wording >> bit & 1 for bit in range(5))
    text = FRAMES[frame].format(
        who=WHO[meaning.who][who], what=WHAT[meaning.what][what],
        where=WHERE[meaning.where][where], does=DOES[meaning.does][2 * does],
        done=DOES[meaning.does][2 * does + 1])
    return text.capitalize()


def opposite(meaning: Meaning) -> Meaning:
    return meaning._replace(does=meaning.does ^ 1)


def copies(text: str, count: int, rng: random.Random, *, rate: float = 0.2) -> list[str]:
    """Copies of a text; each word is dropped, or changes places, with probability `rate`."""
    return [swap_words(delete_words(text, rng, rate=rate), rng, rate=rate) for _ in range(count)]


def pair_scores(label: Tensor, group: Tensor) -> dict[str, float]:   # (N,), (N,)
    """Precision and recall of the pairs that share a label; a label below 0 is none."""
    joined = (label[:, None] == label) & (label >= 0)
    planted = group[:, None] == group
    joined, planted = (pairs.triu(diagonal=1) for pairs in (joined, planted))
    both = (joined & planted).sum().item()
    return {"precision": both / max(joined.sum().item(), 1), "recall": both / planted.sum().item()}

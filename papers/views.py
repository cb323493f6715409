"""
How can a text be changed and stay a positive? Text views, the menu of --positives.

A view takes a sentence and a random source, and returns a sentence that is never empty; `rate` is
the share of words that it changes.
"""

import math
import random


def keep(sentence: str, rng: random.Random) -> str:
    """The sentence itself: dropout makes two encodings differ, the best of SimCSE's Table 1."""
    return sentence


def crop(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """A run of neighbouring words: a share `rate` is cut off at the ends (SimCSE, Table 1)."""
    words = sentence.split()
    length = math.ceil(len(words) * (1 - rate))
    start = rng.randint(0, len(words) - length)
    return " ".join(words[start : start + length])


def delete_words(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """Each word is dropped with probability `rate`; one always stays (SimCSE, Table 1)."""
    words = sentence.split()
    return " ".join(word for word in words if rng.random() >= rate) or rng.choice(words)


def repeat_words(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """Some words stand twice in a row: at most a share `rate`, or two where that is less."""
    words = sentence.split()
    most = min(max(2, int(rate * len(words))), len(words))
    twice = set(rng.sample(range(len(words)), rng.randint(0, most)))
    return " ".join(f"{word} {word}" if i in twice else word for i, word in enumerate(words))


def swap_words(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """Each word changes places with the next with probability `rate`; none moves twice."""
    words, i = sentence.split(), 0
    while i < len(words) - 1:
        swap = rng.random() < rate
        if swap:
            words[i], words[i + 1] = words[i + 1], words[i]
        i += 1 + swap
    return " ".join(words)


def switch_case(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """Each word's first letter changes its case with probability `rate` (CARDS, their v2).

    A cased tokenizer cuts "Dog" into other tokens than "dog"; an uncased one undoes the change.
    """
    words = between_spaces(sentence)
    return " ".join(flip(word) if rng.random() < rate else word for word in words)


def switch_case_quota(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """A share `rate` of the words, one at least, change as by `switch_case` (CARDS, their v1)."""
    words = between_spaces(sentence)
    letters = [i for i in rng.sample(range(len(words)), len(words)) if words[i][0].isalpha()]
    chosen = set(letters[: max(1, round(rate * len(words)))])
    return " ".join(flip(word) if i in chosen else word for i, word in enumerate(words))


def between_spaces(sentence: str) -> list[str]:
    """The words as the authors of CARDS cut them: a tab or a no-break space stays in its word."""
    return [word for word in sentence.split(" ") if word]


def flip(word: str) -> str:
    """The word, its first letter in the other case if that is one letter: "12th", "ß" stay."""
    first = word[0].upper() if word[0].islower() else word[0].lower()
    return first + word[1:] if word[0].isalpha() and len(first) == 1 else word


POSITIVES = {"dropout": keep, "crop": crop, "delete-words": delete_words,
             "repeat-words": repeat_words, "swap-words": swap_words,
             "switch-case": switch_case, "switch-case-quota": switch_case_quota}

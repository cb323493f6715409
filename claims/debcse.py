"""
DebCSE: drawn by inverse propensity, positives are chosen less by their surface, more by meaning.

Source: Miao, Du, Zhang. CIKM 2023, arXiv 2309.07396, abstract.
Planted: 600 meanings in two wordings without a common word, and a false friend each: the words of
the first wording, but for a verb that says the contrary. The teacher knows who means what. Ten
draws a sentence, of changed copies of itself and of its nearest to the teacher.

Why not: the surface is counted over all candidates, and strangers among the nearest share few
words, as the paraphrases do. So low surfaces are common in the pool, and paraphrases drawn less.
"""

import random

import torch
import torch.nn.functional as F

from claims import Rows, Shows, Trial, show
from claims.planted import meanings, opposite, say
from data import Corpus
from papers.debcse import VERSIONS, Config, debiased_pairs, surface_bin, word_numbers

SHOWS = [Shows("paraphrases", "10 bins", "1 bin: no correction"),
         Shows("same words", "1 bin: no correction", "10 bins")]


def measure(trial: Trial) -> Rows:
    known = meanings(trial.scaled(600), trial.rng)
    rows = [(say(meaning, wording), meaning) for meaning in known for wording in (0, 31)]
    rows += [(say(opposite(meaning), 0), opposite(meaning)) for meaning in known]
    texts, meant = zip(*rows)
    number = {meaning: place for place, meaning in enumerate(dict.fromkeys(meant))}
    label = torch.tensor([number[meaning] for meaning in meant])                    # (N,)
    every = [change(text, random.Random(place)) for change in VERSIONS
             for place, text in enumerate(texts)]
    drawn = torch.Generator().manual_seed(trial.seed)
    vectors = F.normalize(torch.randn(len(number), 128, generator=drawn), dim=-1)
    vectors = vectors[label.repeat(len(VERSIONS))]                                  # (5N, 128)
    vectors = vectors + 0.03 * torch.randn(vectors.shape, generator=drawn)
    corpus, words = Corpus("planted", [texts], None, "", blank=0), word_numbers(every, most=16)
    return {name: draws(corpus, vectors, words, label, Config(propensity_bins=bins, epochs=10,
                                                              seed=trial.seed, own_rate=0.0))
            for name, bins in (("1 bin: no correction", 1), ("10 bins", 10))
            } | {"perfect": {"same meaning": 1}}


def draws(corpus: Corpus, vectors, words, label, config: Config) -> dict[str, float]:
    """What the positives are that were drawn: shares, and the mean share of equal words."""
    positives, _, _ = debiased_pairs(corpus, vectors, words, config)                # (E, N)
    row, own = positives % len(label), torch.arange(len(label)).expand_as(positives)
    same, other = label[row] == label[own], row != own
    surface = surface_bin(words[own.flatten()], words[positives.flatten()], 100).float() / 100
    return {"same meaning": same.float().mean().item(), "same words": surface.mean().item(),
            "paraphrases": (same & other).float().mean().item()}


if __name__ == "__main__":
    show(__name__)

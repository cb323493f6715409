"""
Ten exercises: docs/EXERCISES.md says what each is about. Write the bodies here, then run

    python -m pytest docs/exercises -k 03

for the third. B rows of a batch, C candidates, T tokens, D width, as everywhere.
"""

import random

from torch import Tensor

from model import SentenceEncoder
from papers import settings
from papers.simcse import Encoded, SimCSE


def info_nce(anchor: Tensor, positive: Tensor, *, temperature: float) -> Tensor:
    """01: mean_i -log exp(cos(a_i, p_i) / τ) / Σ_j exp(cos(a_i, p_j) / τ).   (B, D) x 2 -> ()"""
    raise NotImplementedError


def push_shares(anchor: Tensor, positive: Tensor, *, temperature: float) -> Tensor:
    """02: which share of an anchor's push goes to each negative? 0 at (i, i), a row sums to 1.

    (B, D) x 2 -> (B, B), in proportion to the gradient of InfoNCE with respect to the cosines.
    """
    raise NotImplementedError


def symmetric(anchor: Tensor, positive: Tensor, *, temperature: float) -> Tensor:
    """03: InfoNCE where the anchors ask and where the positives ask, half each."""
    raise NotImplementedError


def two_views(model: SentenceEncoder, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """04: two encodings that differ by dropout, in one forward pass.   (B, T) x 2 -> (B, D) x 2"""
    raise NotImplementedError


def broken_views(model: SentenceEncoder, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """04, too: two encodings with dropout, and yet the same: both have one dropout mask."""
    raise NotImplementedError


def uniformity(x: Tensor) -> Tensor:
    """05: log mean_{i<j} exp(-2 |x_i - x_j|²) of rows brought to length 1.   (B, D) -> ()"""
    raise NotImplementedError


def max_pooling(hidden: list[Tensor], mask: Tensor) -> Tensor:
    """06: of every coordinate the largest among the real tokens of the last layer.   -> (B, D)"""
    raise NotImplementedError


def hard_info_nce(anchor: Tensor, positive: Tensor, hard: Tensor, *, alpha: float,
                  temperature: float) -> Tensor:
    """07: eq. 8 of SimCSE. All hard negatives are candidates; the own one counts α.   -> ()"""
    raise NotImplementedError


def true_negatives(ids: Tensor) -> Tensor:
    """08: 0 where two rows of a batch have the same tokens, else 1; 1 at (i, i).   -> (B, B)"""
    raise NotImplementedError


def my_view(sentence: str, rng: random.Random, *, rate: float) -> str:
    """09: your own way to change a share `rate` of the words and keep the meaning."""
    raise NotImplementedError


class Geometry(SimCSE):
    """10: loss = alignment(anchor, positive) + w · uniformity(anchors and positives)"""
    Config = settings.Config          # one of its own, with the weight w: `uniformity_weight`

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        raise NotImplementedError

"""
What counts as *the same*? Ways to make a positive of a sentence.

Text views take a sentence and a random source and return a sentence; `POSITIVES` is their menu.
The first, `keep`, changes nothing and is the best known (SimCSE, Table 1): the encoder's dropout
makes the two views differ. `MemoryBuffer` works on embeddings instead: it blends a positive with
its nearest relatives among the last few batches (IS-CSE).
"""

import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def keep(sentence: str, rng: random.Random) -> str:
    """The sentence itself: the encoder's dropout alone makes the two views differ (SimCSE)."""
    return sentence


def crop(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """A run of neighbouring words, `rate` of them cut off at the ends (SimCSE, Table 1)."""
    words = sentence.split()
    length = math.ceil(len(words) * (1 - rate))
    start = rng.randint(0, len(words) - length)
    return " ".join(words[start : start + length])


def delete_words(sentence: str, rng: random.Random, *, rate: float = 0.1) -> str:
    """Each word is dropped with probability `rate`; one always stays (SimCSE, Table 1)."""
    words = sentence.split()
    return " ".join(word for word in words if rng.random() >= rate) or rng.choice(words)


POSITIVES = {"dropout": keep, "crop": crop, "delete-words": delete_words}


class MemoryBuffer(nn.Module):
    """The last M embeddings, unit length. Only looked up, never learned from: no gradient enters.

    IS-CSE (He et al. 2023), section 3; sizes and order of operations are those of their code.
    """

    def __init__(self, slots: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(slots, width))   # (M, D), oldest first

    @property
    def full(self) -> Tensor:                                     # () bool
        """Has every slot been written? As a tensor, so that asking does not halt a GPU."""
        return self.rows[0].any()

    @torch.no_grad()
    def push(self, x: Tensor) -> None:                            # (B, D)
        """The newest rows go in at the end, as many of the oldest leave."""
        assert len(x) <= len(self.rows), "a batch larger than the buffer would change its length"
        self.rows = torch.cat([self.rows[len(x):], F.normalize(x, dim=-1)])

    def smooth(self, x: Tensor, *, neighbours: int = 16, temperature: float = 2.0) -> Tensor:
        """Blend each embedding with its nearest memories; x itself was pushed just before.

            g = Σ_m w_m k_m,   w = softmax(x · k_m / β),   k = x and its K nearest rows

        The nearest row of all is x's own copy, so that rank is left out. Gradient flows through
        x as a member of its group and through its scores, never into the memory. β: 2.0.
        """
        x = F.normalize(x, dim=-1)                                                  # (B, D)
        ranks = (x.detach() @ self.rows.mT).topk(neighbours + 1).indices            # (B, 1 + K)
        group = torch.cat([x[:, None], self.rows[ranks[:, 1:]]], dim=1)             # (B, 1 + K, D)
        weight = (group @ x[:, :, None] / temperature).softmax(dim=1)               # (B, 1 + K, 1)
        return (weight * group).sum(dim=1)                                          # (B, D)

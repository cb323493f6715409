"""
How are embeddings compared? Contrastive losses and the geometry they shape.

    anchor      (B, D)  one view of each of B sentences
    candidates  (C, D)  C >= B: row i is the positive of anchor i, every other row its negative
    weight      (B, C)  how much candidate j counts for anchor i: 1 as usual, 0 not at all
                        (a false negative), α for a hard negative; left out, all count as 1

A batch brings its own negatives, which is why its size matters, and hard negatives are simply
more rows. Embeddings come as the encoder left them: cosines ignore their length.

Read `info_nce` first: every other loss changes a line or two of it. All are pure functions of
tensors, without state or model.
Not here: how views are made (positives.py), how hard negatives are found (negatives.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:                       # (B, D), (C, D) -> (B, C)
    """The cosine of every row of a with every row of b: in [-1, 1]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT


def pick_own(logits: Tensor, weight: Tensor | None = None) -> Tensor:   # (B, C), (B, C) -> ()
    """Cross-entropy of B multiple-choice questions; the answer to question i is column i.

    A weight multiplies exp(logit), so log 0 = -inf takes a candidate out of the choice.
    """
    if weight is not None:
        logits = logits + weight.log()
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def info_nce(anchor: Tensor, candidates: Tensor, *, temperature: float = 0.05,
             weight: Tensor | None = None) -> Tensor:
    """Each anchor must recognise its own positive among all candidates.

        loss = mean_i  -log  exp(cos(a_i, c_i) / τ) / Σ_j w_ij exp(cos(a_i, c_j) / τ)

    SimCSE (Gao et al. 2021): eq. 4 where dropout alone makes the views, eq. 5 with hard
    negatives among the candidates, eq. 8 with a weight α on them. τ: Table D.1.
    """
    return pick_own(cosine(anchor, candidates) / temperature, weight)


def focal_info_nce(anchor: Tensor, candidates: Tensor, *, temperature: float = 0.05,
                   weight: Tensor | None = None, hardness: float = 0.3) -> Tensor:
    """InfoNCE that pushes most on the negatives that are closest already.

    Every cosine s is scaled by itself: s·s for the positive, s·(s + m) for a negative, m being
    the `hardness`. A negative weighs more than in InfoNCE where s > 1 - m, less below; gradient
    flows through both factors. No m gives InfoNCE back: m = 0 is InfoNCE on squared cosines.
    Focal-InfoNCE (Hou & Li 2023); the formula and m = 0.3 are those of the authors' code.
    """
    s = cosine(anchor, candidates)                                # (B, C)
    own = torch.eye(*s.shape, dtype=torch.bool, device=s.device)  # (B, C), True at (i, i)
    return pick_own(torch.where(own, s * s, s * (s + hardness)) / temperature, weight)


LOSSES = {"info-nce": info_nce, "focal": focal_info_nce}


def alignment(anchor: Tensor, positive: Tensor) -> Tensor:        # (B, D), (B, D) -> ()
    """Mean squared distance from anchor to positive on the unit sphere: 0 is best, 4 worst.

    Wang & Isola 2020, with exponent 2; equals 2 - 2 x the mean cosine.
    """
    return (F.normalize(anchor, dim=-1) - F.normalize(positive, dim=-1)).square().sum(-1).mean()


def uniformity(x: Tensor, *, chunk: int = 1024) -> Tensor:        # (N, D) -> ()
    """How evenly the unit sphere is used: 0 is collapse, lower is better, about -4 the floor.

        log mean_{i<j} exp(-2 |x_i - x_j|²)        (Wang & Isola 2020; each pair counts once)

    The 149M pairs of the whole STS benchmark would fill a gigabyte: `chunk` rows at a time.
    """
    x = F.normalize(x, dim=-1)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk]                           # (chunk, D)
        closeness = torch.exp(4 * (rows @ x[start:].mT) - 4)      # |u - v|² = 2 - 2 u·v
        total += closeness.triu(diagonal=1).sum(dtype=torch.float64)
    return (total / math.comb(len(x), 2)).log()

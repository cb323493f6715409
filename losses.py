"""
How are embeddings compared? Contrastive losses and the geometry they shape.

    anchor      (B, D)  one view of each of B sentences
    candidates  (C, D)  C >= B: row i is the positive of anchor i, every other row its negative
    weight      (B, C)  how much candidate j counts for anchor i: 1 as usual, 0 not at all
                        (a false negative), α for a hard negative; left out, all count as 1

A batch brings its own negatives, which is why its size matters, and hard negatives are simply
more rows. Embeddings come as the encoder left them: cosines ignore their length.
Read `info_nce` first: most losses of papers change a line or two of it.
Not here: losses that one paper alone has, and how views and negatives are found (papers/).
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

    A weight multiplies exp(logit), so weight 0 takes a candidate out of the choice.
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


def many_positives(logits: Tensor, positive: Tensor, *, focus: float = 0.0) -> Tensor:
    """Each anchor must recognise all of its positives; one that it knows already counts less.

        loss = mean_i mean_{j in P_i}  -(1 - p_ij)^γ log p_ij,   p_ij = softmax_j of the logits

    (B, C), (B, C) -> (). γ is the `focus`: 0 is supervised contrast (Khosla et al. 2020), 1 the
    focal loss of Core-tuning (Zhang et al. 2021), whose released code divides by the number of
    columns, not of positives. A logit of -inf takes out a candidate, which must not be a positive.
    """
    log_p = logits.log_softmax(dim=1).masked_fill(~positive, 0)   # else -inf x 0 makes NaN
    missing = (-torch.expm1(log_p)).clamp(min=1e-12)              # 1 - p; above 0 for the slope
    each = positive * missing**focus * -log_p                     # (B, C)
    return (each.sum(dim=1) / positive.sum(dim=1)).mean()


def alignment(anchor: Tensor, positive: Tensor) -> Tensor:        # (B, D), (B, D) -> ()
    """Mean squared distance from anchor to positive on the unit sphere: 0 is best, 4 worst.

    Wang & Isola 2020, exponent 2; it equals 2 - 2 x the mean cosine.
    """
    return (F.normalize(anchor, dim=-1) - F.normalize(positive, dim=-1)).square().sum(-1).mean()


def uniformity(x: Tensor, *, chunk: int = 256) -> Tensor:         # (N, D) -> ()
    """How evenly the unit sphere is used: 0 is collapse, lower is better, about -4 the floor.

        log mean_{i<j} exp(-2 |x_i - x_j|²)        (Wang & Isola 2020; each pair counts once)

    The 149M pairs of the whole STS benchmark would fill a gigabyte: `chunk` rows at a time.
    """
    x = F.normalize(x, dim=-1)
    double = torch.float32 if x.device.type == "mps" else torch.float64   # which mps lacks
    total = torch.zeros((), dtype=double, device=x.device)
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk]                           # (chunk, D)
        closeness = torch.exp(4 * (rows @ x[start:].mT) - 4)      # |u - v|² = 2 - 2 u·v
        total += closeness.triu(diagonal=1).sum(dtype=double)
    return (total / math.comb(len(x), 2)).log()

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


def innate_margin(x: Tensor, changed: Tensor, *, most: float = 0.5) -> Tensor:
    """How far a change took each text, to an encoder without dropout.    (B, D) x 2 -> (B,)

        m_i = 1 - cos(x_i, changed_i), within 0 and `most`
    """
    return (1 - F.cosine_similarity(x, changed, dim=-1)).clamp(0, most)


def twin_gap(anchor: Tensor, identical: Tensor, fraternal: Tensor) -> Tensor:
    """How much closer the same text is than a changed one.    (B, D) x 3 -> (B,)

        gap_i = cos(a_i, identical_i) - cos(a_i, fraternal_i)
    """
    return (F.cosine_similarity(anchor, identical, dim=-1)
            - F.cosine_similarity(anchor, fraternal, dim=-1))


def twins_loss(gap: Tensor, margin: Tensor) -> Tensor:            # (B,), (B,) -> ()
    """How far the gap between two kinds of positives is from what it should be.

        loss = mean_i (gap_i - m_i)²

    Two-sided: a gap that closes costs as much as one that widens. Of cosines, not logits: divided
    by τ, a gap would be 20 times what it is in m. In the style of IFTCL (Xiao et al. 2023): its
    abstract promises a loss that preserves the innate margin, and this formula of it is ours.
    """
    return (gap - margin).square().mean()


def detection_loss(logits: Tensor, replaced: Tensor, mask: Tensor) -> Tensor:
    """Was this token replaced? Cross-entropy over the real tokens.   (B, T, 2), (B, T)s -> ()

        loss = mean_t  -log softmax(o_t)[y_t],   y_t = 1 where the token is not the original

    DiffCSE (Chuang et al. 2022). The paper writes a sum; the authors' code takes the mean, which
    its weight λ belongs to, but over padding too: then a batch's width would change its loss.
    """
    return F.cross_entropy(logits[mask], replaced[mask].long())


def nearer_negatives(cosines: Tensor, likeness: Tensor, *, angular_margin: float) -> Tensor:
    """Cosines after every negative came nearer by an angle: the less alike, the more.

        cos(θ_ij - m |1 - A_ij|)  where i != j and θ_ij > m, else cos θ_ij    (B, B)s -> (B, B)

    A is the likeness a teacher sees, θ the student's angle: AdapACSE (Nguyen et al. 2024), after
    the authors' code. The margin is in radians and on negatives; ArcFace's is on the positive.
    Expanded as cos θ cos d + sin θ sin d, since arccos has no gradient where a cosine is 1.
    """
    nearer = angular_margin * (1 - likeness).abs()                # radians
    own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    inside = cosines.clamp(-1 + 1e-7, 1 - 1e-7)                   # or the root has none, either
    moved = inside * nearer.cos() + (1 - inside.square()).sqrt() * nearer.sin()
    return torch.where((cosines < math.cos(angular_margin)) & ~own, moved, cosines)


def angular_margin_nce(anchor: Tensor, positive: Tensor, likeness: Tensor, *,
                       temperature: float = 0.05, angular_margin: float = 0.125,
                       weight: Tensor | None = None) -> Tensor:
    """InfoNCE among positives, its negatives harder where the teacher finds them less alike.

    Never below InfoNCE, and equal to it where all likeness (B, B) is 1.
    """
    s = nearer_negatives(cosine(anchor, positive), likeness, angular_margin=angular_margin)
    return pick_own(s / temperature, weight)


def many_positives(logits: Tensor, positive: Tensor, *, focus: float = 0.0) -> Tensor:
    """Each anchor must recognise all of its positives; one that it knows already counts less.

        loss = mean_i mean_{j in P_i}  -(1 - p_ij)^γ log p_ij,   p_ij = softmax_j of the logits

    (B, C), (B, C) -> (). γ is the `focus`: without it this is supervised contrast, every positive
    staying in the denominator (Khosla et al. 2020); with 1, the focal one of Core-tuning (Zhang et
    al. 2021). Its mean is over P_i; the released code divides by all columns instead. A logit of
    -inf takes a candidate out, which must not be a positive.
    """
    log_p = logits.log_softmax(dim=1).masked_fill(~positive, 0)   # or -inf x 0 would make NaN
    missing = (-torch.expm1(log_p)).clamp(min=1e-12)              # 1 - p; above 0 for the slope
    each = positive * missing**focus * -log_p                     # (B, C)
    return (each.sum(dim=1) / positive.sum(dim=1)).mean()


def pseudo_negative_nce(anchor: Tensor, positive: Tensor, others: Tensor, *,
                        temperature: float = 0.05, pseudo_weight: float = 1.0) -> Tensor:
    """InfoNCE with a second vector of every other sentence among the negatives.    (B, D)s -> ()

        loss = mean_i  -log  exp(s(a_i, p_i)) / (Σ_j exp(s(a_i, p_j)) + w Σ_{j≠i} exp(s(a_i, o_j)))
        s(a, b) = cos(a, b) / τ

    PNR (Cha, Cho, Moon 2024) uses it twice: to learn, `others` are vectors of the previous model;
    to remember, the positives are those and `others` the present ones. The sentence's own second
    vector is no negative, as in the authors' MoCo form; their SimCLR form lets it be one.
    """
    own = torch.eye(len(anchor), dtype=anchor.dtype, device=anchor.device)
    weight = torch.cat([torch.ones_like(own), pseudo_weight * (1 - own)], dim=1)    # (B, 2B)
    return info_nce(anchor, torch.cat([positive, others]), temperature=temperature, weight=weight)


def relaxed_all_pairs(x: Tensor, labels: Tensor, *, temperature: float = 0.05,
                      threshold: float = 0.7) -> tuple[Tensor, Tensor]:
    """Attraction of sentences with one label, and its brake.    (B, D), (B,) -> (A,), (B,)

        contrast_i = mean_{j in P_i} -log  exp(s_ij / τ) / Σ_{k≠i} exp(s_ik / τ)
        penalty_i  = log(exp(1 / τ) + Σ_{j in P_i, s_ij > λ} exp(s_ij / τ)) - 1 / τ

    P_i: the others of the batch with its label; the A anchors that have any make the contrast.
    Without the penalty a class collapses to a point. FedRCL (Seo et al. 2024); the form over all
    pairs is the one their abstract speaks of, written down by us.
    """
    s = cosine(x, x)                                              # (B, B)
    own = torch.eye(len(s), dtype=torch.bool, device=s.device)
    mates = (labels[:, None] == labels) & ~own
    count = mates.sum(dim=1)                                      # (B,)
    surprise = (s / temperature).masked_fill(own, -math.inf).logsumexp(dim=1)
    contrast = surprise - (s * mates).sum(dim=1) / count.clamp(min=1) / temperature
    # Shifted by 1, so that nothing near exp(20) is ever computed; the 1 itself stands at (i, i).
    excess = ((s - 1) / temperature).masked_fill(~(mates & (s > threshold)), -math.inf)
    return contrast[count > 0], excess.masked_fill(own, 0).logsumexp(dim=1)


def relaxed_hardest(x: Tensor, labels: Tensor, *, temperature: float = 0.05,
                    threshold: float = 0.7) -> tuple[Tensor, Tensor]:
    """The same from the hardest pairs alone.    (B, D), (B,) -> (B,), (B,)

        contrast_i = -log  exp(s⁺ / τ) / (exp(s⁺ / τ) + the two nearest of other labels)
        penalty_i  = log(1 + exp((m - 1) / τ)),   m = min_{j in P_i} s_ij, or -1 where it is < λ

    s⁺ is the least cosine with the same label, the anchor's with itself included: so alone of its
    label it still has a positive. As in FedRCL's released code.
    """
    s = cosine(x, x)                                              # (B, B)
    same = labels[:, None] == labels
    own = torch.eye(len(s), dtype=torch.bool, device=s.device)
    positive = s.masked_fill(~same, math.inf).amin(dim=1)                           # (B,)
    negatives = s.masked_fill(same, -math.inf).topk(min(2, len(s)), dim=1).values   # (B, 2)
    logits = torch.cat([positive[:, None], negatives], dim=1) / temperature
    least = s.masked_fill(~same | own, math.inf).amin(dim=1)      # (B,), infinity where alone
    braked = (least >= threshold) & (least < math.inf)
    return (logits.logsumexp(dim=1) - logits[:, 0],
            F.softplus((least.where(braked, -1) - 1) / temperature))


RELAXED = {"all-pairs": relaxed_all_pairs, "hardest": relaxed_hardest}

LOSSES = {"info-nce": info_nce, "focal": focal_info_nce}


def alignment(anchor: Tensor, positive: Tensor) -> Tensor:        # (B, D), (B, D) -> ()
    """Mean squared distance from anchor to positive on the unit sphere: 0 is best, 4 worst.

    Wang & Isola 2020, with exponent 2; equals 2 - 2 x the mean cosine.
    """
    return (F.normalize(anchor, dim=-1) - F.normalize(positive, dim=-1)).square().sum(-1).mean()


def token_similarity(x: Tensor, mask: Tensor) -> Tensor:          # (B, T, D), (B, T) -> (B,)
    """Mean cosine of the m tokens of a sentence: 1 where all are alike, 0 where unrelated.

        TokSim = Σ_{u != v} cos(x_u, x_v) / (m (m - 1)) = (|Σ_u x_u / |x_u||² - m) / (m (m - 1))

    The measure of over-smoothing within a layer of Chen et al. 2023 (SSCL), eq. 1; the form on
    the right needs no (T, T) cosines. NaN for a sentence of one token, which has no pair.
    """
    total = (F.normalize(x, dim=-1) * mask[:, :, None]).sum(dim=1)                  # (B, D)
    m = mask.sum(dim=1)                                                             # (B,)
    likeness = (total.square().sum(dim=-1) - m) / (m * (m - 1))
    return likeness.where(m > 1, math.nan)


def uniformity(x: Tensor, *, chunk: int = 256) -> Tensor:         # (N, D) -> ()
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


def class_cosines(x: Tensor, labels: Tensor) -> tuple[float, float]:   # (N, D), (N,)
    """Mean cosine of two rows of one label, and of two labels: (1, low) is collapse by class."""
    s, same = cosine(x, x), labels[:, None] == labels             # (N, N)s
    others = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    return s[same & others].mean().item(), s[~same].mean().item()


def participation_ratio(x: Tensor) -> float:                      # (N, D)
    """How many directions the embeddings fill: from 1, all on a line, to D, a ball.

        (Σ λ)² / Σ λ²,   λ the eigenvalues of their covariance
    """
    x = F.normalize(x, dim=-1)
    covariance = (x - x.mean(dim=0)).mT @ (x - x.mean(dim=0))     # (D, D)
    return (covariance.trace().square() / covariance.square().sum()).item()

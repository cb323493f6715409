"""
Core-tuning: the hardest pairs of a labelled batch are mixed into still harder ones.

Unlike SimCSE with pairs or triples: rows of equal premises are one group, and what one of them
entails is a positive of all; two mixtures join the batch; a classifier learns from the same pairs.
    __init__  the groups, a head for the contrast alone, and the classifier
    loss      η · many_positives(anchor; entailed, contradicted, positive+, negative+)
              + w · cross-entropy of pairs: entailed, contradicted or unrelated

    positive+ = λ · least similar positive + (1 - λ) · most similar negative,   λ ~ Beta(a, a)
    negative+ = λ' · stranger + (1 - λ') · anchor,           λ' ~ Beta(a, a), but at least 0.8

A stranger is a random hypothesis of another group. Shares are drawn anew for every anchor.

In the style of Zhang, Hooi, Hu, Liang, Feng: NeurIPS 2021, arXiv 2102.06605, on labelled images.
Mixing, its place before the head and the focal loss are theirs; groups for their classes, pairs for
their classifier, and η are ours. We follow the paper: the released code masks with 0 instead of
infinity, so that it rarely finds the least similar positive, and sends gradients to mixtures only.
Counted in operations, a step costs under 3 % more than SimCSE's on the same corpus.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from engine.flags import Row, dashed, flag
from losses import cosine, many_positives
from papers import settings
from papers.corpus import text_numbers
from papers.simcse import Encoded, SimCSE


@dataclass(frozen=True)
class Config(settings.Config):
    mixing_alpha: float = flag(1.0, "core-tuning", "parameter a of Beta(a, a) (code)", above=0)
    focus: float = flag(1.0, "core-tuning", "exponent γ of the focal loss (code)", least=0)
    contrast_weight: float = flag(1.0, "core-tuning", "weight η of the contrast (ours)", least=0)
    classifier_weight: float = flag(1.0, "core-tuning", "weight w of classifying (code)", least=0)


# A vector for each anchor (B, D); the shares of entailed, contradicted, unrelated: (B, 3) or (3,).
Pairs = tuple[Tensor, Tensor]


class CoreTuning(SimCSE):
    """A supervised contrastive loss and a classifier, both of given and of mixed pairs."""
    Config = Config
    rows = [Row("--method core-tuning --corpus nli", "the hardest pairs are mixed into harder ones",
                "Zhang, Hooi, Hu, Liang, Feng: Core-tuning. NeurIPS 2021, arXiv 2102.06605",
                "none on text: theirs is on images")]
    recipes = {"any": dict(head="none")}                          # the contrast has its own
    columns_taken = (2, 3)
    losses_taken = ("info-nce",)

    @classmethod
    def check(cls, config, corpora, shape):
        for name, only in (("hard_negative_weight", 1), ("head", "none")):
            if (found := getattr(config, name)) != only:
                raise ValueError(f"--method core-tuning has a loss and a head of its own, found "
                                 f"{dashed(name)} {found}: use {dashed(name)} {only}")
        if not config.contrast_weight + config.classifier_weight:
            raise ValueError("--contrast-weight and --classifier-weight are both 0, so there is "
                             "nothing to learn: use --contrast-weight 1")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        width = model.config.width
        self.register_buffer("group", text_numbers(corpus.columns[0]), persistent=False)   # (N,)
        self.project = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 256))
        self.classify = nn.Linear(3 * width, 3, bias=False)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        anchor, group = out.anchor, self.group[out.rows]          # (B, D), (B,)
        same = group[:, None] == group                            # (B, B)
        # The columns after the anchor: what it entails and, in triples, what it contradicts.
        given = list(zip(out.columns[1:], torch.eye(3).to(anchor, non_blocking=True)))
        strangers, mixed = harder(anchor, given, same, alpha=self.config.mixing_alpha,
                                  rng=np.random.default_rng([self.config.seed, out.step]))
        contrast = self.supervised_contrast(anchor, given, mixed, same)
        classifier = self.classifier_loss(anchor, given + strangers + mixed)
        self.terms = {"contrastive_loss": contrast.detach(), "classifier_loss": classifier.detach()}
        return self.config.contrast_weight * contrast + self.config.classifier_weight * classifier

    def supervised_contrast(self, anchor: Tensor, given: list[Pairs], mixed: list[Pairs],
                            same: Tensor) -> Tensor:              # -> ()
        """Every anchor among all given and mixed vectors; the head comes after mixing."""
        x = torch.cat([vectors for vectors, _ in given + mixed])                    # (C, D)
        positive = F.pad(same, (0, len(x) - len(anchor)))         # (B, C)
        left_out = torch.zeros_like(positive)                     # (B, C)
        if mixed:
            own = torch.eye(len(anchor), device=same.device).bool()                 # (B, B)
            at = slice(-2 * len(anchor), -len(anchor))            # where positive+ stands
            # It was made for one anchor: others of its group do not see it.
            positive[:, at], left_out[:, at] = own, same & ~own
        logits = cosine(self.project(anchor), self.project(x)) / self.config.temperature
        logits = logits.masked_fill(left_out, -math.inf)          # (B, C)
        return many_positives(logits, positive, focus=self.config.focus)

    def classifier_loss(self, anchor: Tensor, pairs: list[Pairs]) -> Tensor:        # -> ()
        """Cross-entropy with shares as labels, the mean over all pairs."""
        x = torch.cat([torch.cat([anchor, vectors, (anchor - vectors).abs()], dim=1)
                       for vectors, _ in pairs])                  # (P, 3·D)
        label = torch.cat([shares.expand(len(anchor), 3) for _, shares in pairs])   # (P, 3)
        return F.cross_entropy(self.classify(x), label)


def mix(a: Pairs, b: Pairs, share: Tensor) -> Pairs:              # share: (B, 1)
    """`share` of a and the rest of b, in vectors and labels."""
    return tuple(share * x + (1 - share) * y for x, y in zip(a, b))


def harder(anchor: Tensor, given: list[Pairs], same: Tensor, *, alpha: float,
           rng: np.random.Generator) -> tuple[list[Pairs], list[Pairs]]:
    """The strangers, then positive+ and negative+ of every anchor."""
    if same.all():                                                # one group has no strangers
        return [], []
    entailed, contradicted, unrelated = torch.eye(3).to(anchor, non_blocking=True)
    hypotheses, _ = given[0]                                      # (B, D) those that are entailed
    x = torch.cat([vectors for vectors, _ in given])              # (C, D), C = B or 2B
    positive, negative, stranger = choose(anchor, x, same, rng)                     # (B,) x 3
    shares = torch.from_numpy(rng.beta(alpha, alpha, (2, len(anchor), 1)))
    share, most = shares.to(anchor, non_blocking=True)                              # (B, 1)s
    # Row B + i of x is contradicted by anchor i; all its other negatives are unrelated to it.
    own = negative == torch.arange(len(anchor), 2 * len(anchor), device=anchor.device)
    label = torch.where(own[:, None], contradicted, unrelated)                      # (B, 3)
    return [(x[stranger], unrelated)], [
        mix((hypotheses[positive], entailed), (x[negative], label), share),
        mix((x[stranger], unrelated), (anchor, entailed), most.clamp(min=0.8))]


@torch.no_grad()
def choose(anchor: Tensor, x: Tensor, same: Tensor, rng: np.random.Generator
           ) -> tuple[Tensor, Tensor, Tensor]:                    # (B, D), (C, D), (B, B)
    """For each anchor the least similar positive, the most similar negative and a stranger."""
    similarity = cosine(anchor, x)                                                  # (B, C)
    entailed = F.pad(same, (0, len(x) - len(anchor)))                               # (B, C)
    chance = torch.from_numpy(rng.random(similarity.shape)).to(                     # (B, C)
        similarity, non_blocking=True)
    own_group = same.repeat(1, len(x) // len(anchor))             # with what its rows contradict
    return (similarity.masked_fill(~entailed, math.inf).argmin(dim=1),
            similarity.masked_fill(entailed, -math.inf).argmax(dim=1),
            chance.masked_fill(own_group, -1).argmax(dim=1))

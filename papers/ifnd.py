"""
IFND: negatives of the anchor's own cluster are left out, those of surest label first.

Unlike SimCSE: sentences of a batch that probably mean the same do not push each other away.
    rounds    R + 1 rounds of equal length, rows in the order SimCSE has; round 0 is SimCSE
    refresh   before round r = 1 to R, the encoder clusters the corpus into K and into 4·K clusters,
              so a sentence has two labels; of each kind the surest share, ρ r / R, is accepted
    loss      the mean over both kinds; a candidate that shares an accepted label with the anchor is
              left out, or becomes a further positive (`attract`); hard negatives stay as they are

In the style of Chen, Hung, Tseng, Chien, Yang: ICLR 2022, arXiv 2106.03719. Their abstract has the
clusters, the growing acceptance, and both uses of it, for images. Neither full text nor code could
be had, so confidence, ramp and K are ours. Clusters of Wikipedia are topics, so `attract` makes
positives of texts that merely share one.
A step costs what SimCSE's costs; on top, four refreshes of a corpus take two thirds of an epoch.
"""

import math
import random
import warnings
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.flags import Row, flag
from losses import cosine, many_positives
from papers import settings
from papers.corpus import EMPTY, assign, index, kmeans, rows_of_run, stretches
from papers.simcse import Encoded, SimCSE, own_hard_negative


@dataclass(frozen=True)
class Config(settings.Config):
    false_negatives: str = flag("eliminate", "ifnd", "treatment of false negatives: left out, or "
                                "made positives", ["eliminate", "attract"])
    clusters: int = flag(0, "ifnd", "clusters K, and 4·K; 0: about the batch size (ours)", least=0)
    cluster_rounds: int = flag(4, "ifnd", "R, refreshes of the clusters (ours)", least=1)
    accepted: float = flag(1.0, "ifnd", "share ρ of labels accepted at last", least=0, most=1)


class IFND(SimCSE):
    """loss = mean over both K of L(anchor, candidates that are not false negatives)"""
    Config = Config
    rows = [Row("--method ifnd", "negatives of the anchor's cluster are left out, the surest first",
                "Chen, Hung, Tseng, Chien, Yang: IFND. ICLR 2022, arXiv 2106.03719",
                "none on text: theirs is on images")]
    toy = dict(cluster_rounds=2)

    @classmethod
    def check(cls, config, corpora, shape):
        if config.false_negatives == "attract" and config.loss != "info-nce":
            raise ValueError(f"--false-negatives attract has its own loss, found --loss "
                             f"{config.loss}: use --loss info-nce")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        k = config.clusters or 2 ** round(math.log2(config.batch_size - 1))
        self.sizes = (k, 4 * k)
        # No label counts in round 0, which is SimCSE: an encoder clusters worst before training.
        accepted = torch.full((2, len(corpus)), EMPTY, dtype=torch.int32)
        self.register_buffer("label", accepted)                   # (2, N)
        self.register_buffer("refreshed", torch.tensor(0))

    def rounds(self, steps):
        """R + 1 rounds of as many steps, each on all rows, so that the order of rows goes on."""
        return [(end - begin, range(len(self.corpus)))
                for begin, end in stretches(steps, self.config.cluster_rounds)]

    def refresh(self, encode, rows):
        """Cluster the rows that the run sees, and accept more of the labels than before."""
        rows = rows_of_run(len(rows), self.config)                # few, where --steps ends it early
        texts = [self.corpus.columns[0][row] for row in rows]
        x = index(partial(encode, max_tokens=self.config.max_tokens), texts)
        x = x.to(self.label.device)                               # (n, D)
        self.refreshed += 1
        for level, k in enumerate(self.sizes):
            rng = random.Random(f"{self.config.seed} clusters {self.refreshed} {k}")
            centres = kmeans(x, k, seed=rng.getrandbits(63), device=self.label.device)
            label, _, confidence = assign(x, centres)
            label = accept(label, confidence, self.share)
            self.label[level, rows] = label.to(self.label)
            if (torch.bincount(label[label != EMPTY]) / len(rows)).square().sum() > 0.95:
                warnings.warn("ifnd: more than 95 % of all pairs share a cluster, so nothing keeps "
                              "vectors apart: try more --clusters, or a lower --accepted")

    @property
    def share(self) -> float:
        """The share of the labels that is accepted by now: ρ r / R after r refreshes."""
        return self.config.accepted * self.refreshed.item() / self.config.cluster_rounds

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        batch, candidates = len(out.anchor), torch.cat(out.columns[1:])             # (C, D)
        weight = own_hard_negative(out.anchor, self.config.hard_negative_weight)
        weight = weight[:, : len(candidates)]                                       # (B, C)
        false = torch.stack([false_negatives(label[out.rows]) for label in self.label])
        false = F.pad(false, (0, len(candidates) - batch))                          # (2, B, C)
        # The share of all negatives of the batch.
        self.terms = {"false_negatives": false.sum() / (2 * batch * (batch - 1))}
        if self.config.false_negatives == "attract":
            logits = cosine(out.anchor, candidates) / self.config.temperature + weight.log()
            own = torch.eye(batch, len(candidates), dtype=torch.bool, device=logits.device)
            return sum(many_positives(logits, own | x) for x in false) / 2
        return sum(self.loss_of(out.anchor, candidates, weight=weight.masked_fill(x, 0))
                   for x in false) / 2

    def logs(self) -> dict[str, float]:
        return {"accepted": self.share} | super().logs()


def accept(label: Tensor, confidence: Tensor, share: float) -> Tensor:   # (N,), (N,) -> (N,)
    """The floor(share · N) labels of highest confidence, of equal ones the first; else EMPTY."""
    order = confidence.argsort(descending=True, stable=True)
    return label.index_fill(0, order[math.floor(share * len(label)) :], EMPTY)


def false_negatives(label: Tensor) -> Tensor:                     # (B,) -> (B, B) bool
    """Which pairs share a label that was accepted of both; no row pairs with itself."""
    return ((label[:, None] == label) & (label != EMPTY)).fill_diagonal_(False)

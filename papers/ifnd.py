"""
IFND: negatives of the anchor's own cluster are left out, the surest first, in the end all.

Unlike SimCSE: sentences of a batch that probably mean the same do not push each other away.
    rounds    R + 1 rounds of as many steps, in SimCSE's order of the rows; no label is accepted in
              round 0, so it is plain SimCSE
    refresh   before round r = 1 to R, the present encoder clusters the corpus, into K and into 4·K
              clusters; of both kinds of labels, the share ρ r / R with most confidence is accepted
    loss      negatives that share an accepted label with the anchor are left out; or they become
              further positives (`attract`)

In the style of Chen, Hung, Tseng, Chien, Yang: ICLR 2022, arXiv 2106.03719. Their abstract has the
clusters, the acceptance that grows, and both uses of it, for images. Neither full text nor code
could be had, so confidence, ramp and K are ours. Clusters of Wikipedia are topics, so `attract`
makes positives of texts that merely share one.
A step costs as much as one of SimCSE; four refreshes of a whole corpus, two thirds of an epoch.
"""

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Corpus
from engine.flags import Row, flag
from losses import cosine, many_positives
from model import EncoderConfig, SentenceEncoder
from papers import settings
from papers.corpus import EMPTY, assign, index, kmeans, rows_of_run
from papers.simcse import Encoded, SimCSE, own_hard_negative


@dataclass(frozen=True)
class Config(settings.Config):
    false_negatives: str = flag("eliminate", "ifnd", "treatment of false negatives: left out, or "
                                "made positives", ["eliminate", "attract"])
    clusters: int = flag(0, "ifnd", "clusters K, and 4·K next to them; 0: about the batch size "
                         "(ours)", least=0)
    cluster_rounds: int = flag(4, "ifnd", "R, refreshes of the clusters (ours)", least=1)
    accepted: float = flag(1.0, "ifnd", "ρ, share of the labels that the last refresh accepts "
                           "(ours)", least=0, most=1)


class IFND(SimCSE):
    """loss = mean over both K of L(anchor, candidates that are not false negatives)

    Labels speak of anchors and their positives; hard negatives stay what they are.
    """
    Config = Config
    rows = [Row("--method ifnd", "negatives of the anchor's cluster are left out, the surest first",
                "Chen, Hung, Tseng, Chien, Yang: IFND. ICLR 2022, arXiv 2106.03719",
                "none on text: theirs is on images")]
    toy = dict(cluster_rounds=2)

    @classmethod
    def check(cls, config: Config, corpora: list[Corpus], shape: EncoderConfig) -> None:
        if config.false_negatives == "attract" and config.loss != "info-nce":
            raise ValueError(f"--false-negatives attract has its own loss, found --loss "
                             f"{config.loss}: use --loss info-nce, or --false-negatives eliminate")

    def __init__(self, corpus: Corpus, config: Config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        k = config.clusters or 2 ** round(math.log2(config.batch_size - 1))
        self.sizes = (k, 4 * k)
        label = torch.full((2, len(corpus)), EMPTY, dtype=torch.int32)
        self.register_buffer("label", label)                      # (2, N) accepted ones only
        self.register_buffer("refreshed", torch.tensor(0))

    def rounds(self, steps: int) -> list[tuple[int, Sequence[int]]]:
        """R + 1 rounds of as many steps, each on all rows, so that the order of rows goes on."""
        count = min(self.config.cluster_rounds + 1, steps)
        ends = [steps * number // count for number in range(count + 1)]
        return [(end - begin, range(len(self.corpus))) for begin, end in zip(ends, ends[1:])]

    def refresh(self, encode: Callable, rows: Sequence[int]) -> None:
        """Cluster the rows that the run sees, and accept more of the labels than before."""
        rows = rows_of_run(len(rows), self.config)                # few, where --steps ends it early
        texts = [self.corpus.columns[0][row] for row in rows]
        x = index(partial(encode, max_tokens=self.config.max_tokens), texts)        # (n, D)
        self.refreshed += 1
        number = self.refreshed.item()
        for level, k in enumerate(self.sizes):
            seed = random.Random(f"{self.config.seed} clusters {number} {k}").getrandbits(63)
            centres = kmeans(x, k, seed=seed, device=self.label.device)
            label, _, confidence = assign(x, centres)
            self.label[level, rows] = accept(label, confidence, self.share).to(self.label)
        warn_of_collapse(self.label[:, rows])

    @property
    def share(self) -> float:
        """The share of the labels that is accepted after r refreshes: ρ r / R."""
        return self.config.accepted * self.refreshed.item() / self.config.cluster_rounds

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        batch, candidates = len(out.anchor), torch.cat(out.columns[1:])             # (C, D)
        weight = own_hard_negative(batch, self.config.hard_negative_weight).to(out.anchor)
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
    """The labels of highest confidence, exactly floor(share · N); EMPTY for the others.

    Of equal confidence the first ones, so that a greater share contains the smaller.
    """
    order = confidence.argsort(descending=True, stable=True)
    return label.index_fill(0, order[math.floor(share * len(label)) :], EMPTY)


def false_negatives(label: Tensor) -> Tensor:                     # (B,) -> (B, B) bool
    """Which pairs share a label that was accepted of both; nobody is a negative of itself."""
    same = (label[:, None] == label) & (label != EMPTY)
    return same.fill_diagonal_(False)


def warn_of_collapse(labels: Tensor) -> None:                     # (2, N)
    """Where nearly all negatives are left out, nothing keeps the vectors apart."""
    for label in labels:
        sizes = torch.bincount(label[label != EMPTY])
        if (sizes / len(label)).square().sum() > 0.95:
            warnings.warn("ifnd: more than 95 % of all pairs share a cluster, so hardly a negative "
                          "is left: try more --clusters, or a lower --accepted")

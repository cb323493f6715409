"""
InfoCSE: the encoder finds its own positives inside documents, and learns to find better ones.

Unlike SimCSE: a positive may be another sentence, of the same cluster of the same document.
    rounds    R + 1 rounds of equal length, each on its own documents; the first is plain SimCSE
    refresh   before each later round, the encoder finds clusters and pairs in its documents
    views     the positive is the sentence itself, or one that it makes a positive pair with
    loss      sentences of one cluster, and equal texts, are no negatives of each other

In the style of Yang, Liu, Xiao, Lian, Wu, Lian, Sun, Xie: arXiv 2202.13802, whose abstract has the
idea that annotation and representation improve each other. A summary by others has the clusters
inside documents; all else is ours, since neither full text nor code could be had. The InfoCSE of Wu
et al. (arXiv 2210.06432) is another method.
A step costs as much as SimCSE's; with R = 3, all annotations add an eighth to the run.
"""

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.flags import Row, flag
from papers import settings
from papers.corpus import stretches, text_numbers, words_of
from papers.simcse import Encoded, SimCSE


@dataclass(frozen=True)
class Config(settings.Config):
    annotation_rounds: int = flag(3, "infocse", "R, rounds with positive pairs (ours)", least=1)
    annotator: str = flag("current", "infocse", "encoder that finds pairs: as it is before each "
                          "round, or frozen after the first (ours)", ["current", "frozen"])
    annotation_quantile: float = flag(0.9, "infocse", "quantile of the cosines inside documents "
                                      "where positive pairs begin (recipe)", least=0, below=1)
    largest_cluster: int = flag(8, "infocse", "sentences in a cluster, at most (ours)", least=2,
                                why=", since one sentence makes no pair")
    own_rate: float = flag(0.5, "infocse", "ρ, probability that a sentence with positive pairs "
                            "is its own positive (ours)", least=0, most=1)
    mate_temperature: float = flag(0.1, "infocse", "τ_s, temperature of the draw (ours)", above=0)


class Annotation(NamedTuple):
    """Which sentences of some documents belong together, according to an encoder."""
    threshold: float                                              # of the cosine of a pair
    coverage: float                                               # share of rows that are in a pair
    cluster: dict[int, int]                                       # row -> first row of its cluster
    pairs: dict[tuple[int, int], float]                           # rows i < j -> cosine


class InfoCSE(SimCSE):
    """The positive of i is i itself with probability ρ, else the j of a positive pair (i, j):

        j ~ softmax_j(cos(z_i, z_j) / τ_s)
    """
    Config = Config
    rows = [Row("--method infocse", "the model annotates its own positives, inside documents",
                "Yang, Liu, Xiao, Lian, Wu, Lian, Sun, Xie: arXiv 2202.13802",
                "none verified; the algorithm is ours, after the abstract")]
    recipes = {"small": dict(batch_size=128, annotation_quantile=0.95)}   # ours: a weaker encoder
    toy = dict(annotation_rounds=2, annotation_quantile=0.5)
    columns_taken = (1,)
    for_views = ("paired", "chance")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        lines, K = corpus.columns[0], config.largest_cluster - 1
        self.documents = find_documents(lines, corpus.documents)  # the rows of each
        few = min(2000, math.ceil(len(self.documents) / 10))
        self.probe = list(chain(*random.Random(config.seed).sample(self.documents, few)))
        self.register_buffer("text", text_numbers(lines), persistent=False)         # (N,)
        self.register_buffer("cluster", torch.arange(len(lines)))                   # (N,)
        self.register_buffer("paired", torch.zeros(len(lines), K, dtype=torch.int32))   # (N, K)
        self.register_buffer("chance", torch.zeros(len(lines), K))                  # (N, K)
        self.register_buffer("annotations", torch.tensor(0))
        self.register_buffer("logged", torch.full((3,), math.nan))

    def rounds(self, steps):
        """R + 1 rounds of the documents in random order, which is a new one in every pass."""
        batch, rows = self.config.batch_size, []
        for number in range(math.ceil(steps * batch / len(self.corpus))):
            rng = random.Random(f"{self.config.seed} {number}")
            rows += chain(*rng.sample(self.documents, len(self.documents)))
        return [(end - begin, rows[begin * batch : end * batch])
                for begin, end in stretches(steps, self.config.annotation_rounds)]

    def refresh(self, encode, rows):
        """Annotate the documents of these rows, and a probe that shows how much has changed."""
        config = self.config
        if config.annotator == "frozen":                          # all, once and for all
            if self.annotations:
                return
            rows = range(len(self.corpus))
        asked = {*rows, *self.probe}
        documents = [each for each in self.documents if not asked.isdisjoint(each)]
        found = annotate(self.corpus.columns[0], documents,
                         partial(encode, max_tokens=config.max_tokens), seed=config.seed,
                         quantile=config.annotation_quantile, largest=config.largest_cluster)
        rows, before = list(found.cluster), self.cluster[self.probe]
        paired, chance = pair_table(found.pairs, rows, width=self.paired.shape[1],
                                    temperature=config.mate_temperature)
        self.cluster[rows] = torch.tensor(list(found.cluster.values())).to(self.cluster)
        self.paired[rows], self.chance[rows] = paired, chance
        agreed = adjusted_rand(before, self.cluster[self.probe]) if self.annotations else math.nan
        self.annotations += 1
        self.logged.copy_(torch.tensor([found.threshold, found.coverage, agreed]))

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        anchors, positives = super().views(rows, rng)
        known = zip(self.paired[rows].tolist(), self.chance[rows].tolist())
        for place, (paired, chance) in enumerate(known):
            if any(chance) and rng.random() >= self.config.own_rate:
                positives[place] = self.corpus.columns[0][rng.choices(paired, chance)[0]]
        return [anchors, positives]

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        cluster, text = self.cluster[out.rows], self.text[out.rows]                 # (B,)s
        differ = (cluster[:, None] != cluster) & (text[:, None] != text)            # (B, B)
        weight = differ.fill_diagonal_(True).to(out.anchor.dtype)
        return self.loss_of(out.anchor, out.positive, weight=weight)

    def logs(self) -> dict[str, float]:
        """`agreement`: adjusted Rand index of a probe's clusters with those found before."""
        found = zip(("threshold", "coverage", "agreement"), self.logged.tolist())
        return {name: value for name, value in found if not math.isnan(value)}


def is_title(line: str) -> bool:
    """A line of at most 8 words without a mark of an end: so titles look in SimCSE's file."""
    return len(line.split()) <= 8 and line[-1] not in '.!?")'


def can_be_paired(line: str) -> bool:
    """No title, fragment or list: these look alike, so that pairs of them teach nothing."""
    return 6 <= len(line.split()) <= 64 and not is_title(line)


def find_documents(lines: list[str], documents: list[int] | None) -> list[range]:
    """The rows of each document, 64 at most; where the file marks none, each title begins one."""
    titles = list(map(is_title, lines))
    if documents is None and 200 * sum(titles) < len(lines):
        raise ValueError(f"expected documents, found {sum(titles)} titles in {len(lines)} lines, "
                         "so they seem shuffled: use another --corpus, with blank lines or titles")
    begins = [0]
    for row in range(1, len(lines)):
        new = titles[row] if documents is None else documents[row] != documents[row - 1]
        if new or row - begins[-1] == 64:
            begins.append(row)
    return [range(*ends) for ends in zip(begins, begins[1:] + [len(lines)])]


def annotate(lines: list[str], documents: list[range], encode: Callable, *, quantile: float,
             largest: int = 8, seed: int = 0) -> Annotation:
    """Cluster the sentences of each document, and find the positive pairs of each cluster."""
    rows = [[row for row in document if can_be_paired(lines[row])] for document in documents]
    sizes = [len(each) for each in rows]
    x = F.normalize(encode([lines[row] for each in rows for row in each]), dim=-1)  # (N, D)
    similarities = [(y @ y.mT).numpy() for y in x.split(sizes)]
    rng = np.random.default_rng(seed)                             # leaves the global one alone
    within = np.concatenate([s[np.triu_indices(len(s), 1)] for s in similarities])
    within = rng.choice(within, 2_000_000, replace=False) if len(within) > 2_000_000 else within
    document = np.repeat(np.arange(len(rows)), sizes)             # (N,)
    i, j = rng.integers(max(len(x), 1), size=(2, 100_000 if len(x) else 0))
    apart = document[i] != document[j]
    across = (x[i[apart]] * x[j[apart]]).sum(dim=-1).numpy()      # cosines between documents
    for raised in (quantile, min(quantile + 0.03, 1)):
        threshold = similarity_threshold(within, across, quantile=raised)
        cluster, pairs = {row: row for document in documents for row in document}, {}
        for each, similarity in zip(rows, similarities):
            names = average_linkage(similarity, threshold=threshold, largest=largest)
            cluster |= {row: each[name] for row, name in zip(each, names)}
            pairs |= positive_pairs(lines, each, names, similarity, threshold=threshold)
        coverage = len({*chain(*pairs)}) / len(cluster)
        if coverage <= 0.6:                                       # else the threshold was too low
            break
    if coverage < 0.01:
        warnings.warn(f"infocse: only {coverage:.2%} of the sentences are in a positive pair, so "
                      "this round is SimCSE: try a lower --annotation-quantile")
        cluster, pairs = {row: row for row in cluster}, {}
    return Annotation(threshold, coverage, cluster, pairs)


def similarity_threshold(within: np.ndarray, across: np.ndarray, *, quantile: float) -> float:
    """The least cosine of a positive pair; it follows the encoder, whose cosines shrink.

        δ = max(the quantile of cosines within documents, mean + 3 std of those across), in 0..0.95
    """
    floor = across.mean() + 3 * across.std() if len(across) else 0.0
    usual = np.quantile(within, quantile) if len(within) else 1.0
    return float(np.clip(max(usual, floor), 0.0, 0.95))


def average_linkage(similarity: np.ndarray, *, threshold: float, largest: int = 8
                    ) -> np.ndarray:                              # (N, N) -> (N,)
    """Merge the clusters of highest mean similarity, down to `threshold`, up to `largest` members.

        S(A ∪ B, C) = (|A| S(A, C) + |B| S(B, C)) / (|A| + |B|)

    A cluster is named after its first member; of equal means, reading order decides.
    """
    n = len(similarity)
    s, sizes, name = np.array(similarity, np.float64), np.ones(n), np.arange(n)
    while (fits := np.triu((sizes[:, None] + sizes <= largest) & (s >= threshold), 1)).any():
        a, b = divmod(int(np.where(fits, s, -np.inf).argmax()), n)
        s[a] = s[:, a] = (sizes[a] * s[a] + sizes[b] * s[b]) / (sizes[a] + sizes[b])
        s[b] = s[:, b] = -np.inf                                  # b belongs to a from now on
        sizes[a] += sizes[b]
        name[name == b] = a
    return name


def positive_pairs(lines: list[str], rows: list[int], names: np.ndarray, similarity: np.ndarray, *,
                   threshold: float) -> dict[tuple[int, int], float]:
    """The pairs in a cluster that reach the threshold and share less than 80 % of their words."""
    # Average linkage lets in weak members, and pairs of nearly the same words teach nothing.
    words, found = [set(words_of(lines[row])) for row in rows], {}
    for i, j in np.argwhere(np.triu((names[:, None] == names) & (similarity >= threshold), 1)):
        if len(words[i] & words[j]) < 0.8 * len(words[i] | words[j]):
            found[rows[i], rows[j]] = float(similarity[i, j])
    return found


def pair_table(pairs: dict[tuple[int, int], float], rows: list[int], *, width: int,
               temperature: float) -> tuple[Tensor, Tensor]:      # -> (R, width), (R, width)
    """The partners of each row, and their chances: softmax of cosine / τ, or all zero."""
    partners = {row: {} for row in rows}                          # row -> its partners -> cosine
    for (i, j), cosine in pairs.items():
        partners[i][j] = partners[j][i] = cosine
    paired = torch.zeros(len(rows), width, dtype=torch.int32)
    scores = torch.full((len(rows), width), -math.inf)
    for place, cosines in enumerate(partners.values()):
        for slot, (row, cosine) in enumerate(cosines.items()):
            paired[place, slot], scores[place, slot] = row, cosine
    return paired, (scores / temperature).softmax(dim=1).nan_to_num()


def adjusted_rand(a: Tensor, b: Tensor) -> float:                 # (N,), (N,) labels -> -1..1
    """How much two clusterings agree: 1 on everything, 0 as by chance (Hubert & Arabie 1985)."""
    a, b = a.tolist(), b.tolist()
    both, in_a, in_b = (sum(math.comb(size, 2) for size in Counter(labels).values())
                        for labels in (zip(a, b), a, b))          # pairs together in both, a, b
    expected, most = in_a * in_b / math.comb(len(a), 2), (in_a + in_b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)

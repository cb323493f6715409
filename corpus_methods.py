"""
What does a paper make of a corpus? Papers that look at all of it, with the encoder, before step 1.

    prepare(encode, seed)    before the first step          refresh(encode, rows)    before a round

What they find (neighbours, clusters, documents' mates, margins, drawn pairs) lies in buffers of the
method, which are saved with the run. Read `SimCSE` in methods.py first; the search itself is in
positives.py and negatives.py, as functions that can be read alone.
"""

import math
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import batches, encoder_folder
from eval_sts import open_encoder
from folders import read_config
from losses import RELAXED, cosine, innate_margin, many_positives, twin_gap, twins_loss
from methods import Encoded, SimCSE, own_hard_negative
from model import POOLINGS, SentenceEncoder, encode
from negatives import (EMPTY, Words, accept, assign, debiased_pairs, draw, false_negatives,
                       first_texts, index, input_weight, kmeans, nearest_others, topics)
from positives import (ANNOTATION_FIGURES, Annotation, MemoryBuffer, adjusted_rand, annotate, crop,
                       delete_words, find_documents, mate_table, repeat_words, swap_words,
                       text_numbers)


class Twins(SimCSE):
    """A changed text is a positive too, but stays as far off as its meaning was before training.

        loss = ½ L(anchor, identical) + ½ L(anchor, fraternal) + λ(t) · twins_loss

    An identical twin is the same text under another dropout mask, a fraternal one a changed text.
    Identical twins of past batches stay on as negatives in a queue. In the style of IFTCL (Xiao,
    Li, Chen 2023, known to us by its abstract): two kinds of positives, the innate margin and the
    queue are theirs; formulas, text views and sizes are ours. Costs 1.5 steps of SimCSE.
    """
    columns_taken = (1,)
    queue_starts = 500                # steps: before, the vectors of a batch are outdated too soon

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        # A tuple: what stands in one is no part of this module, so neither trained nor saved.
        self.reference = open_encoder(encoder_folder(config.teacher)) if config.teacher else ()
        self.register_buffer("margins", torch.zeros(len(corpus.columns[0])))        # (N,)
        slots = config.queue_batches * config.batch_size
        self.queue = MemoryBuffer(slots, model.config.width)
        self.register_buffer("queued", torch.full((slots,), -1))                    # (M,) row or -1

    def prepare(self, start: Callable, seed: int) -> None:
        """The innate margin of every row that the run will see."""
        if self.reference:
            model, tokenizer = self.reference
            ask = partial(encode, model.to(self.margins.device), tokenizer)
        else:
            ask = start
            print(RAW_MARGINS.format(self.config.encoder), file=sys.stderr)
        ask = partial(ask, max_tokens=self.config.max_tokens)     # no more than training sees
        texts, rows = self.corpus.columns[0], rows_of_run(len(self.margins), self.config)
        for i in tqdm(range(0, len(rows), 4096), disable=None, desc="margins", unit="chunk"):
            some = rows[i : i + 4096]
            margin = innate_margin(ask([texts[row] for row in some]),
                                   ask([self.fraternal(row) for row in some]))
            self.margins[some] = margin.to(self.margins)

    def fraternal(self, row: int) -> str:
        """The changed text of a row. It is always the same one, as its margin is."""
        rng = random.Random(f"{self.config.seed} twin {row}")
        change = rng.choice(FRATERNAL) if self.config.positives == "dropout" else self.view
        return change(self.corpus.columns[0][row], rng)

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        texts = [self.corpus.columns[0][row] for row in rows]
        return [texts, texts, [self.fraternal(row) for row in rows]]

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        anchor, identical, fraternal = out.columns
        margin = self.margins[out.rows]                           # (B,)
        # Empty slots, the sentence itself and, at first, the whole queue weigh nothing.
        remembered = (self.queued >= 0) & (self.queued != out.rows[:, None])        # (B, M)
        remembered = remembered & (out.step > self.queue_starts)
        weight = F.pad(remembered.to(anchor.dtype), (len(anchor), 0), value=1.)     # (B, B + M)
        contrast = sum(self.loss_of(anchor, torch.cat([twin, self.queue.rows]), weight=weight)
                       for twin in (identical, fraternal)) / 2
        gap = twin_gap(anchor, identical, fraternal)              # (B,)
        twins = twins_loss(gap, margin)
        if len(self.queued):
            self.queue.push(identical)
            self.queued = torch.cat([self.queued[len(anchor):], out.rows])
        ranks = torch.stack([gap.detach(), margin]).argsort().argsort().to(gap)     # (2, B)
        # Does the gap follow the margin? Means over the batch, and their rank correlation.
        self.parts = {"contrastive_loss": contrast.detach(), "twins_loss": twins.detach(),
                      "gap": gap.detach().mean(), "innate_margin": margin.mean(),
                      "gap_margin_correlation": torch.corrcoef(ranks)[0, 1]}
        ramp = min(1, out.step / (0.1 * out.steps))               # the first gaps are noise
        return contrast + self.config.twins_weight * ramp * twins


FRATERNAL = [partial(repeat_words, rate=0.32), partial(delete_words, rate=0.15),
             partial(swap_words, rate=0.1), partial(crop, rate=0.3)]


RAW_MARGINS = ("mincse.py: the innate margins come from {} as it starts; an encoder that was never "
               "trained on sentences finds them all near 0: use --teacher with one that was")


def rows_of_run(n: int, config) -> list[int]:
    """The rows that training will see: all n, unless --steps ends it within the first epoch."""
    if not 0 < config.steps < n // config.batch_size:
        return list(range(n))
    order = batches(n, config.batch_size, seed=config.seed, epochs=1)
    return [row for rows in islice(order, config.steps) for row in rows]


class InfoCSE(SimCSE):
    """The encoder finds its own positives, and learns from them to find better ones.

        round 0:   SimCSE on a first part of the corpus
        round r:   cluster each document of part r with the present encoder, then train on it:
                   the positive is the sentence itself with probability ρ, else another one, j,
                   of its cluster, chosen by softmax_j(z_i · z_j / τ_s);
                   no sentence is a negative of its own cluster or of an equal text

    In the style of Yang et al. 2022 (arXiv 2202.13802), whose abstract has the idea: annotation
    and representation improve each other. No more could be had, so the algorithm is ours. The
    InfoCSE of Wu et al. 2022 is another.
    """
    columns_taken = (1,)

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        lines, K = corpus.columns[0], config.largest_cluster - 1
        self.documents = find_documents(lines, corpus.documents)
        self.document = [number for number, rows in enumerate(self.documents) for _ in rows]
        few = min(2000, math.ceil(len(self.documents) / 10))
        self.probe = random.Random(config.seed).sample(range(len(self.documents)), few)
        self.register_buffer("text", text_numbers(lines), persistent=False)         # (N,)
        self.register_buffer("cluster", torch.arange(len(lines)))                   # (N,)
        self.register_buffer("mates", torch.zeros(len(lines), K, dtype=torch.int32))   # (N, K)
        self.register_buffer("chance", torch.zeros(len(lines), K))                  # (N, K)
        self.register_buffer("annotations", torch.tensor(0))
        self.register_buffer("figures", torch.full((len(ANNOTATION_FIGURES) + 1,), math.nan))

    def rounds(self, steps: int) -> list[tuple[int, Sequence[int]]]:
        """Documents in random order, in every pass another, cut into parts of as many steps."""
        batch, count = self.config.batch_size, min(self.config.annotation_rounds + 1, steps)
        rows, passes = [], 0
        while len(rows) < steps * batch:
            shuffled = random.Random(f"{self.config.seed} {passes}")
            rows += chain(*shuffled.sample(self.documents, len(self.documents)))
            passes += 1
        ends = [steps * part // count for part in range(count + 1)]
        return [(end - begin, rows[begin * batch : end * batch])
                for begin, end in zip(ends, ends[1:])]

    def refresh(self, encode: Callable, rows: Sequence[int]) -> None:
        """Annotate the documents of these rows, and some that show how much has changed."""
        if self.config.annotator == "frozen":                     # all, once and for all
            if self.annotations:
                return
            rows = range(len(self.corpus))
        chosen = sorted({self.document[row] for row in rows} | set(self.probe))
        found = annotate(self.corpus.columns[0], [self.documents[n] for n in chosen], encode,
                         quantile=self.config.annotation_quantile,
                         largest=self.config.largest_cluster, seed=self.config.seed)
        probe = [row for number in self.probe for row in self.documents[number]]
        before = self.cluster[probe]
        self.remember(found)
        same = adjusted_rand(before, self.cluster[probe]) if self.annotations else math.nan
        self.annotations += 1
        self.figures.copy_(torch.tensor([*found.figures(), same]))

    def remember(self, found: Annotation) -> None:
        """What training reads of an annotation; one with hardly any mates leaves SimCSE."""
        rows, device = list(found.cluster), self.cluster.device
        if found.coverage < 0.01:
            warnings.warn(f"infocse: only {found.coverage:.2%} of the sentences found a mate, so "
                          "this round is SimCSE: try a lower --annotation-quantile")
            found = Annotation(found.threshold, dict(zip(rows, rows)), [])
        mates, chance = mate_table(found.pairs, rows, width=self.mates.shape[1],
                                   temperature=self.config.mate_temperature)
        self.cluster[rows] = torch.tensor(list(found.cluster.values()), device=device)
        self.mates[rows] = mates.to(device)
        self.chance[rows] = chance.to(self.chance)

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        anchors, positives = super().views(rows, rng)
        known = zip(self.mates[rows].tolist(), self.chance[rows].tolist())
        for i, (mates, chance) in enumerate(known):
            if any(chance) and rng.random() >= self.config.twin_rate:
                positives[i] = self.corpus.columns[0][rng.choices(mates, chance)[0]]
        return [anchors, positives]

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        same = [x[out.rows, None] == x[out.rows] for x in (self.cluster, self.text)]   # (B, B)s
        own = torch.eye(len(out.rows), dtype=torch.bool, device=out.rows.device)
        weight = (own | ~(same[0] | same[1])).to(out.anchor.dtype)
        return self.loss_of(out.anchor, out.positive, weight=weight)

    def logs(self) -> dict[str, float]:
        """`agreement`: adjusted Rand index with the clusters of the round before."""
        values = zip((*ANNOTATION_FIGURES, "agreement"), self.figures.tolist())
        return {name: value for name, value in values if not math.isnan(value)}


class CARDS(SimCSE):
    """The positive may begin a word in the other case; near sentences of the corpus are negatives.

        loss = L(anchor, positives and what every anchor of the batch retrieved)

    Wang et al. 2022. Each anchor draws s of its K nearest sentences, found once, before training,
    by the mean token of the encoder as it was given, and with `--refresh R` again every R steps
    by that of the encoder in training. They are encoded with the batch, with gradient and in
    their own case; `--hard-negative-weight` is e^β on the own ones. Sentences equal but for case
    are one, and none counts for an anchor that it equals. After the authors' code; K is without
    the sentence itself, which their 65 and 9 include. Costs 1.5 steps of SimCSE.
    """
    columns_taken = (1,)

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        self.number = text_numbers(corpus.columns[0]).tolist()    # row -> its text
        self.texts = first_texts(corpus.columns[0], self.number)
        if config.retrieved and config.retrieve_from >= len(self.texts):
            raise ValueError(f"--retrieve-from {config.retrieve_from}: expected at most "
                             f"{len(self.texts) - 1}, as {config.corpus} has {len(self.texts)} "
                             "different sentences: give a lower one, or a larger corpus")
        nearest = torch.zeros(len(self.texts), config.retrieve_from, dtype=torch.int32)
        self.register_buffer("nearest", nearest)                  # (N, K)
        self.static = not config.refresh

    def prepare(self, encode: Callable, seed: int) -> None:
        """Find the K nearest of every sentence. Costs one encoding of all, and 2·N²·D."""
        if self.config.retrieved:
            vectors = index(partial(encode, pooling="mean", max_tokens=self.config.max_tokens),
                            self.texts)
            print(INDEX.format(vectors.nbytes / 1e6, self.nearest.nbytes / 1e6), file=sys.stderr)
            self.nearest.copy_(nearest_others(vectors, self.nearest.shape[1],
                                              device=self.nearest.device))

    def rounds(self, steps: int) -> list[tuple[int, Sequence[int]]]:
        """All rows in one order, with a stop before each new index."""
        every = self.config.refresh or steps
        return [(min(every, steps - begin), range(len(self.corpus)))
                for begin in range(0, steps, every)]

    def refresh(self, encode: Callable, rows: Sequence[int]) -> None:
        self.prepare(encode, self.config.seed)

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        near = self.nearest[[self.number[row] for row in rows]].tolist()            # B x K
        drawn = draw(near, self.config.retrieved, rng)
        return super().views(rows, rng) + [[self.texts[i] for i in column] for column in drawn]

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        batch, (anchor, positive, *retrieved) = len(out.anchor), out.columns
        if not retrieved:
            return super().loss(out)
        weight = input_weight(out.ids[:batch], out.ids[2 * batch :],
                              alpha=self.config.hard_negative_weight)
        own = torch.stack([F.cosine_similarity(anchor, column) for column in retrieved])
        # The cosine to the own retrieved negatives soon falls, or something is wrong.
        self.parts = {"retrieved_cosine": own.mean().detach()}
        return self.loss_of(anchor, torch.cat([positive, *retrieved]), weight=weight)


INDEX = ("mincse.py: the index of all sentences needs {:.0f} MB while it is searched, the table of "
         "neighbours {:.0f} MB")


class DebCSE(SimCSE):
    """Pairs are drawn against the habits of the rules that propose them.

        loss = InfoNCE(anchor; x+ ~ p+, x- ~ p-) without the likely false negatives among the x+
        p_c ∝ r_c / max(e(surface of c), e_min)
        r+ = sem if sem >= θ+,   r- = 1 - sem if sem <= θ-

    Rewritten texts share most words with their source, random ones hardly any: dividing by the
    probability e that a rule proposes such a surface lets the rare ones come up as well. `sem` is
    the cosine that a frozen reference sees. In the style of DebCSE (Miao, Du, Zhang 2023): that
    pairs are chosen so, by surface and meaning, is in its abstract; all formulas are ours. Costs
    1.5 steps of SimCSE.
    """
    columns_taken = (1,)

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        n = len(corpus.columns[0])
        folder = encoder_folder(config.teacher) if config.teacher else None
        width = read_config(folder).width if folder else model.config.width
        own = torch.arange(n, dtype=torch.int32).repeat(config.epochs, 1)
        self.register_buffer("positives", own)                    # (E, N) numbers, see `text`
        self.register_buffer("negatives", own.roll(1, dims=1))    # (E, N) rows
        self.register_buffer("limit", torch.ones(()))             # θ-
        self.register_buffer("reference", torch.zeros(n, width).half())             # (N, Dr)
        self.register_buffer("of_positives", torch.zeros(config.epochs * n, width).half())

    def prepare(self, start: Callable, seed: int) -> None:
        """Draw E pairs a row. Costs 5 encodings of all, 2·N²·D, 60 to 110 edit distances a row."""
        texts, most = self.corpus.columns[0], self.config.max_tokens
        every = [self.text(number) for number in range((1 + len(REWRITINGS)) * len(texts))]
        vectors = index(partial(self.ask(start), max_tokens=most), every)           # (5N, Dr)
        words = Words.of(every, most=most)
        pairs = debiased_pairs(texts, vectors, words, documents=self.corpus.documents,
                               bins=self.config.propensity_bins, twin_rate=self.config.twin_rate,
                               count=self.config.epochs, seed=seed, device=self.limit.device)
        print(f"mincse.py: {pairs.report}", file=sys.stderr)
        self.positives.copy_(pairs.positives.T)
        self.negatives.copy_(pairs.negatives.T)
        self.limit.fill_(pairs.limit)
        self.reference.copy_(vectors[: len(texts)])
        self.of_positives.copy_(vectors[pairs.positives.T.flatten()])

    def ask(self, start: Callable) -> Callable:
        """The reference that judges meaning: the teacher, else the encoder before its training."""
        if self.config.teacher:
            model, tokenizer = open_encoder(encoder_folder(self.config.teacher))
            return partial(encode, model.to(self.limit.device), tokenizer)
        print(RAW_REFERENCE.format(self.config.encoder), file=sys.stderr)
        return partial(start, pooling=self.config.pooling)

    def text(self, number: int) -> str:
        """Row i is number i, its rewriting s is number s·N + i, made anew when it is asked for."""
        texts = self.corpus.columns[0]
        rewriting, row = divmod(number, len(texts))
        if not rewriting:
            return texts[row]
        return REWRITINGS[rewriting - 1](texts[row], random.Random(f"{self.config.seed} {number}"))

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        """All columns come from `prepare`; the batch itself tells which of the E draws it takes."""
        drawn = sum(rows) % len(self.positives)
        return [[self.text(number) for number in column.tolist()] for column in (
            torch.tensor(rows), self.positives[drawn][rows], self.negatives[drawn][rows])]

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        batch, n = len(out.anchor), len(self.reference)
        drawn = out.rows.sum() % len(self.positives) * n + out.rows                 # (B,)
        alike = cosine(self.reference[out.rows].float(), self.of_positives[drawn].float())
        false = (alike > self.limit).fill_diagonal_(False)                          # (B, B)
        weight = own_hard_negative(batch, self.config.hard_negative_weight).to(alike.device)
        weight[:, :batch].masked_fill_(false, 0)
        # The share of the other positives of the batch that was left out.
        self.parts = {"false_negatives": false.sum() / (batch * (batch - 1))}
        candidates = torch.cat(out.columns[1:])                                     # (2B, D)
        return self.loss_of(out.anchor, candidates, weight=weight[:, : len(candidates)])


# Synonyms, which the dossier has, too, need a dictionary that few machines have.
REWRITINGS = [partial(repeat_words, rate=0.32), partial(delete_words, rate=0.2)] * 2


RAW_REFERENCE = ("mincse.py: WARNING: meaning is judged by {} as it starts; debcse needs one "
                 "trained on sentences: use --teacher with one, such as a simcse run")


class IFND(SimCSE):
    """Negatives that cluster with the anchor are left out: the surest early, in the end all.

        before part r of R:  spherical k-means of the corpus by the present encoder, for two K;
                             the share ρ r / R of labels that are surest is accepted
        loss = mean over K of L(anchor, positives), without those of the same accepted label;
               or with them as further positives (`attract`)

    In the style of Chen et al. 2022 (ICLR), whose abstract has the clusters, the acceptance that
    grows with confidence, and both uses. Theirs are images and a queue; how sure a label is, the
    ramp and K for small batches are ours. Clusters of Wikipedia are topics, so attraction makes
    positives of texts that merely share one. A refresh encodes the corpus once: four of them cost
    two thirds of an epoch.
    """

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        n = len(corpus.columns[0])
        k = config.clusters or 2 ** round(math.log2(config.batch_size - 1))
        self.sizes = (k, 4 * k)
        self.register_buffer("label", torch.full((2, n), EMPTY, dtype=torch.int32))   # (2, N)
        self.register_buffer("refreshed", torch.tensor(0))
        self.register_buffer("figures", torch.zeros(len(CLUSTER_FIGURES)))

    def rounds(self, steps: int) -> list[tuple[int, Sequence[int]]]:
        """R equal parts, in the order that SimCSE would take the rows."""
        count = min(self.config.cluster_rounds, steps)
        ends = [steps * part // count for part in range(count + 1)]
        return [(end - begin, range(len(self.corpus))) for begin, end in zip(ends, ends[1:])]

    def refresh(self, encode: Callable, rows: Sequence[int]) -> None:
        """Cluster the rows that the run sees, and accept more of the labels than before."""
        rows = rows_of_run(len(rows), self.config)
        texts = [self.corpus.columns[0][row] for row in rows]
        x = index(partial(encode, max_tokens=self.config.max_tokens), texts)        # (n, D)
        self.refreshed += 1
        part = self.refreshed.item()
        share = self.config.accepted * part / self.config.cluster_rounds
        found = []
        for level, k in enumerate(self.sizes):
            seed = random.Random(f"{self.config.seed} clusters {part} {k}").getrandbits(63)
            centres = kmeans(x, k, seed=seed, device=self.label.device)
            label, _, sure = assign(x, centres)
            self.label[level, rows] = accept(label, sure, share).to(self.label)
            found.append(cluster_figures(label, sure, len(centres)))
        self.figures.copy_(torch.tensor([share, *torch.tensor(found).mean(dim=0).tolist()]))
        warn_of_collapse(self.label[:, rows])

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        batch, candidates = len(out.anchor), torch.cat(out.columns[1:])             # (C, D)
        weight = own_hard_negative(batch, self.config.hard_negative_weight).to(out.anchor)
        weight = weight[:, : len(candidates)]                                       # (B, C)
        false = torch.stack([false_negatives(label[out.rows]) for label in self.label])
        # Labels speak of anchors and their positives; hard negatives stay what they are.
        false = F.pad(false, (0, len(candidates) - batch))                          # (2, B, C)
        logits = cosine(out.anchor, candidates) / self.config.temperature + weight.log()
        # The share of all in-batch negatives, and of the probability that anchors give them.
        self.parts = {"false_negatives": false.sum() / (2 * batch * (batch - 1)),
                      "false_negative_mass": (logits.detach().softmax(dim=1) * false).sum()
                      / (2 * batch)}
        if self.config.false_negatives == "attract":
            own = torch.eye(batch, len(candidates), dtype=torch.bool, device=logits.device)
            return sum(many_positives(logits, own | x) for x in false) / 2
        return sum(self.loss_of(out.anchor, candidates, weight=weight.masked_fill(x, 0))
                   for x in false) / 2

    def logs(self) -> dict[str, float]:
        return dict(zip(CLUSTER_FIGURES, self.figures.tolist())) | super().logs()


# Means over both K: the largest cluster's share of the rows, clusters that hold a row, and how sure
# the labels are at three quantiles.
CLUSTER_FIGURES = ("accepted", "largest_cluster", "clusters_used", "sure_10", "sure_50", "sure_90")


def cluster_figures(label: Tensor, sure: Tensor, k: int) -> list[float]:
    """CLUSTER_FIGURES but the first."""
    sizes = torch.bincount(label, minlength=k)
    quantiles = sure.sort().values[[len(sure) * tenth // 10 for tenth in (1, 5, 9)]]
    return [sizes.max().item() / len(label), (sizes > 0).float().mean().item(),
            *quantiles.tolist()]


def warn_of_collapse(labels: Tensor) -> None:                     # (2, N)
    """Where nearly all negatives go, nothing keeps the vectors apart."""
    for label in labels:
        sizes = torch.bincount(label[label != EMPTY])
        if (sizes / len(label)).square().sum() > 0.95:
            warnings.warn("ifnd: more than 95 % of all pairs share a cluster, so hardly a negative "
                          "is left: try more --clusters, or a lower --accepted")


class FedRCL(SimCSE):
    """Sentences of one class attract each other, but those that are close already are held apart.

        loss = w_ce · CE(class of x) + mean over levels of (w_scl · contrast + β · penalty)

    A level is a layer, pooled: of 12 layers and 3 levels 4, 8 and 12. Plain supervised contrast
    (β = 0) lets every class collapse to a point. Seo et al. 2024, for clients that see few
    classes: `--clients`, regimes.py. Theirs are images. On text all is ours: classes are k-means
    clusters of the corpus as the encoder sees it at the start, and one view of a sentence does.
    """
    columns_taken = (1,)

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        self.pool = POOLINGS[model.pooling]
        self.relaxed = partial(RELAXED[config.relaxed], temperature=config.temperature,
                               threshold=config.penalty_threshold)
        depth = model.config.layers
        self.levels = [round(depth * level / config.levels) - depth - 1       # the last is -1
                       for level in range(1, config.levels + 1)]
        self.layers_read = -self.levels[0]
        self.classifier = nn.Linear(model.config.width, config.classes)
        self.register_buffer("labels", torch.full((len(corpus.columns[0]),), UNKNOWN))   # (N,)

    def prepare(self, encode: Callable, seed: int) -> None:
        """Cluster the corpus, unless a federation has given every sentence its class."""
        if UNKNOWN in self.labels:
            ask = partial(encode, pooling="mean", max_tokens=self.config.max_tokens)
            labels = topics(ask(self.corpus.columns[0]), self.config.classes, seed=seed)
            self.labels.copy_(labels)
            print(f"mincse.py: classes: {labels.unique().numel()} clusters of {len(labels):,} "
                  f"sentences, the largest of {labels.bincount().max():,}", file=sys.stderr)

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        return [[self.view(self.corpus.columns[0][row], rng) for row in rows]]

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        config, labels, self.parts = self.config, self.labels[out.rows], {}
        levels = [self.pool([out.hidden[level]], out.mask).to(out.anchor.dtype)
                  for level in self.levels]                       # K x (B, D)
        same = (labels[:, None] == labels).fill_diagonal_(False)
        close = cosine(levels[-1], levels[-1]) > config.penalty_threshold
        # `close_mates`: of the pairs of one class the share that the penalty holds apart.
        self.parts["close_mates"] = (same & close).sum() / same.sum().clamp(min=1)
        total = out.anchor.new_zeros(())
        if config.ce_weight:
            self.parts["ce_loss"] = F.cross_entropy(self.classifier(levels[-1]), labels)
            total = total + config.ce_weight * self.parts["ce_loss"]
        if config.scl_weight or config.penalty_weight:
            terms = [self.relaxed(x, labels) for x in levels]
            # Where no two sentences share a class, there is nothing to attract.
            contrast = sum(each.sum() / max(len(each), 1) for each, _ in terms) / len(terms)
            penalty = sum(each.mean() for _, each in terms) / len(terms)
            self.parts |= {"contrast": contrast, "penalty": penalty}
            total = total + config.scl_weight * contrast + config.penalty_weight * penalty
        self.parts = {name: part.detach() for name, part in self.parts.items()}
        return total


UNKNOWN = -1                          # the class of a sentence before the corpus was clustered

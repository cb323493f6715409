"""
Which paper puts which pieces together? One short class per paper.

A method is the paper's algorithm box around one encoder forward:

    rows of the corpus --views--> V columns of B texts --the encoder--> V x (B, D) --loss--> scalar

`SimCSE` is the base; every other paper overrides what it changes, and nothing else. The text view,
the loss and the method are three menus (`POSITIVES`, `LOSSES`, `METHODS`) that combine freely;
`check` says in one sentence which combinations make no sense.
"""

import inspect
import math
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Tokenizer, batches, encoder_folder, mask_tokens
from devices import Pieces
from eval_sts import open_encoder
from folders import load, load_masked_lm, read_config
from losses import (LOSSES, RELAXED, angular_margin_nce, cosine, detection_loss, innate_margin,
                    many_positives, pseudo_negative_nce, twin_gap, twins_loss)
from model import POOLINGS, Head, MaskedLMHead, Projector, SentenceEncoder, encode
from negatives import (EMPTY, Words, accept, assign, by_chance, debiased_pairs, draw,
                       false_negatives, first_texts, index, input_weight, kmeans, nearest_others,
                       topics)
from positives import (ANNOTATION_FIGURES, POSITIVES, Annotation, HardPairs, MemoryBuffer, Others,
                       adjusted_rand, annotate, crop, delete_words, find_documents, hard_pairs,
                       harder, mate_table, repeat_words, swap_words, text_numbers)


def bind(variant: Callable, config) -> Callable:
    """Fix those parameters of a variant that the configuration has a value for, by name."""
    names = inspect.signature(variant).parameters
    return partial(variant, **{k: v for k, v in asdict(config).items() if k in names})


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of one batch, in float32, the training head applied."""
    columns: list[Tensor]             # V x (B, D): anchor, positive, and hard negatives if any
    step: int                         # 1 is the first
    steps: int                        # of the whole run
    rows: Tensor | None = None        # (B,) row numbers in the corpus
    ids: Tensor | None = None         # (V·B, T) what was encoded, column after column
    mask: Tensor | None = None        # (V·B, T)
    hidden: list[Tensor] | None = None   # `layers_read` x (V·B, T, D); of the last maybe T = 1
    bf16: bool = False                # a method's own networks compute like the encoder
    pieces: Pieces = Pieces()         # and in the same pieces

    @property
    def anchor(self) -> Tensor:                                   # (B, D)
        return self.columns[0]

    @property
    def positive(self) -> Tensor:                                 # (B, D)
        return self.columns[1]


class SimCSE(nn.Module):
    """Two dropout views of a sentence; or the pairs and hard negatives of the corpus, if any.

    Gao et al. 2021: eq. 4 without labels, eq. 5 with them, eq. 8 with a weight on the own hard
    negative.
    """
    columns_taken = (1, 2, 3)
    reads_teacher = False             # whether it needs corpus.teacher
    layers_read = 1                   # how many hidden layers `loss` gets, from the last one down
    head = Head                       # between pooling and loss while training

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__()
        self.corpus, self.config, self.parts = corpus, config, {}
        self.view = bind(POSITIVES[config.positives], config)
        self.loss_of = bind(LOSSES[config.loss], config)

    def prepare(self, encode: Callable, seed: int) -> None:
        """Look at the whole corpus with the present encoder, once before the first step."""

    def follow(self, model: SentenceEncoder) -> None:
        """Look at the model of the stage before, with which this one starts (regimes.py)."""

    def rounds(self, steps: int) -> list[tuple[int, Sequence[int]]]:
        """How many steps train on which rows, stretch after stretch. Usual: all on all."""
        return [(steps, range(len(self.corpus)))]

    def refresh(self, encode: Callable, rows: Sequence[int]) -> None:
        """Look at the rows of a round, after the first, with the encoder as it is by then."""

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        """The texts of these rows: one list of B per column."""
        columns = [[column[row] for row in rows] for column in self.corpus.columns]
        if len(columns) == 1:
            columns.append([self.view(text, rng) for text in columns[0]])
        return columns

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        """InfoNCE, or what `--loss` names, of the anchors among all other columns."""
        alpha, weight = self.config.hard_negative_weight, None
        if len(out.columns) == 3 and alpha != 1:
            weight = own_hard_negative(len(out.anchor), alpha).to(out.anchor.device)
        return self.loss_of(out.anchor, torch.cat(out.columns[1:]), weight=weight)

    def logs(self) -> dict[str, float]:
        """Figures worth a line in metrics.jsonl: the parts that `loss` left."""
        return {name: value.item() for name, value in self.parts.items()}


def own_hard_negative(batch: int, alpha: float) -> Tensor:        # -> (B, 2B)
    """α at each anchor's own hard negative, 1 at all other candidates (SimCSE, eq. 8)."""
    ones = torch.ones(batch, batch)
    return torch.cat([ones, ones + (alpha - 1) * torch.eye(batch)], dim=1)


class ISCSE(SimCSE):
    """The positive is also smoothed over its nearest neighbours of the last steps.

        loss = L(anchor, positive) + α(t) · L(anchor, smoothed positive)

    He et al. 2023. The smoothing term starts when the buffer is full, at step ceil(M / B).
    """
    columns_taken = (1, 2)

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        self.memory = MemoryBuffer(config.buffer_size, model.config.width)
        self.smooth = partial(self.memory.smooth, neighbours=config.neighbours,
                              temperature=config.smoothing_temperature)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        self.memory.push(out.positive)
        instance = super().loss(out)
        smoothing = self.memory.full * self.loss_of(out.anchor, self.smooth(out.positive))
        self.parts = {"instance_loss": instance.detach(), "smoothing_loss": smoothing.detach()}
        return instance + self.alpha(out.step, out.steps) * smoothing

    def alpha(self, step: int, steps: int) -> float:
        """From `alpha_start` along half a cosine to `alpha_end` at mid-training, then constant."""
        start, end = self.config.alpha_start, self.config.alpha_end
        return min(math.cos(math.pi * (step - 1) / steps) * (start - end), 0) + end


class SSCL(SimCSE):
    """The layers below the last one make negatives, so that the last must say something else.

        loss = (1 - w) · L(anchor, positives) + w · L(anchor, positives and layers L-1 ... L-M)

    Chen et al. 2023. As in their code w is 1/2, and both views of every sentence count, its own
    among them; w = 1 is eq. 4 of the paper. Nothing is detached: lower layers are trained, too.
    """
    columns_taken = (1, 2)

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        # Pooling and head, whichever there is. As a bound method they are no parts of this module.
        self.embed = model.embed
        self.layers_read = 1 + config.layers_as_negatives

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        plain, weight = super().loss(out), self.config.layer_weight
        below = out.hidden[-2 : -2 - self.config.layers_as_negatives : -1] if weight else []
        if not below:                                             # SimCSE
            return plain
        below = [self.embed([x.to(out.anchor.dtype)], out.mask) for x in below]   # M x (V·B, D)
        layered = self.loss_of(out.anchor, torch.cat([out.positive, *below]))
        same = F.cosine_similarity(out.anchor, below[0][: len(out.anchor)]).mean()
        # From an anchor to its own layer L-1: where `layer_cosine` stays near 1, M is idle.
        self.parts = {"instance_loss": plain.detach(), "layer_loss": layered.detach(),
                      "layer_cosine": same.detach()}
        return (1 - weight) * plain + weight * layered


class KDMCSE(SimCSE):
    """Negatives come nearer, the less a frozen teacher finds them alike; its likes are dropped.

        loss = L(z, z') + λ/2 · Σ_v L(g(pooled view v), t(teacher))
        L: InfoNCE with cos(θ_ij - m |1 - A_ij|) on negatives, A being the teacher's cosines

    In the style of KDMCSE (Nguyen et al. 2024): margin, grounding and λ after the authors' code,
    the direction and idea of the filter, too. Theirs has a CLIP teacher, captions and images; one
    text encoder as teacher of plain sentences is ours, and so is the threshold `by_chance`.
    """
    columns_taken = (1,)
    reads_teacher = True

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        self.pool = POOLINGS[model.pooling]
        self.register_buffer("teacher", corpus.teacher, persistent=False)           # (N, Dt)
        self.threshold = config.teacher_threshold or by_chance(corpus.teacher, config.seed)
        self.student_head, self.teacher_head = (
            nn.Sequential(nn.Linear(width, 256), nn.Tanh())
            for width in (model.config.width, corpus.teacher.shape[1]))

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        known = self.teacher[out.rows].to(out.anchor.dtype)                         # (B, Dt)
        alike = cosine(known, known).clamp(max=1)                                   # (B, B)
        own = torch.eye(len(known), dtype=torch.bool, device=known.device)
        kept = (alike <= self.threshold) | own
        loss_of = partial(angular_margin_nce, likeness=alike, weight=kept.to(known.dtype),
                          temperature=self.config.temperature,
                          angular_margin=self.config.angular_margin)
        instance = loss_of(out.anchor, out.positive)
        # `dropped_pairs`: the filter's share of all negatives; well below 0.01 is usual.
        self.parts = {"instance_loss": instance.detach(),
                      "dropped_pairs": (~kept).sum() / (len(kept) ** 2 - len(kept))}
        if not self.config.grounding_weight:
            return instance
        pooled = self.student_head(self.pool(out.hidden, out.mask).to(known.dtype))  # (2B, 256)
        target = self.teacher_head(known)                                           # (B, 256)
        grounding = sum(loss_of(view, target) for view in pooled.chunk(2)) / 2
        self.parts["grounding_loss"] = grounding.detach()
        return instance + self.config.grounding_weight * grounding


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


class DiffCSE(SimCSE):
    """The sentence vector must also tell a second network which of the words were replaced.

        loss = L(anchor, positive) + λ · detection_loss(D(edited, h), edited ≠ original)

    A frozen masked LM reads the sentence with some tokens masked, and its likeliest words make
    the edited one. D, a copy of the encoder, sees the edited sentence with h, the anchor or the
    positive, in place of [CLS]; its gradient reaches the encoder through h. Chuang et al. 2022.
    As in their code words are the likeliest, not drawn, and all places are read; unlike there the
    generator has no dropout, padding has no vote and special tokens stay. A step costs 2.3 of
    SimCSE with a generator of half the layers, about 3 with the encoder itself; memory doubles.
    """
    columns_taken = (1,)
    head = Projector

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        self.discriminator = deepcopy(model.encoder)
        self.detector = nn.Linear(model.config.width, 2)          # original or replaced?
        self.tokenizer = Tokenizer.read(encoder_folder(config.encoder))
        self.guess = frozen_masked_lm(config.generator or config.encoder, self.tokenizer)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        contrast = super().loss(out)
        self.parts = {"contrastive_loss": contrast.detach()}
        if not self.config.rtd_weight:
            return contrast
        with torch.autocast(out.ids.device.type, torch.bfloat16, enabled=out.bf16):
            edited = self.edit(out.ids, out.mask, out.step)                         # (2B, T)
            [logits] = out.pieces(lambda *block: [self.detect(*block)],             # (2B, T, 2)
                                  edited, out.mask, torch.cat(out.columns))
        replaced = edited != out.ids                                                # (2B, T)
        detection = detection_loss(logits.to(contrast.dtype), replaced, out.mask)
        right = (logits.argmax(dim=-1) == replaced)[out.mask].float()               # (R,)
        changed = replaced[out.mask].float()
        # `replaced`: the share; `found`, `left_alone`: how often that is seen, and its lack.
        self.parts |= {"rtd_loss": detection.detach(), "replaced": changed.mean(),
                       "found": (right * changed).sum() / changed.sum(),
                       "left_alone": (right * (1 - changed)).sum() / (1 - changed).sum()}
        return contrast + self.config.rtd_weight * detection

    @torch.no_grad()
    def edit(self, ids: Tensor, mask: Tensor, step: int) -> Tensor:   # (2B, T)s -> (2B, T)
        """The sentences as the generator reads them with some tokens masked, new at each step."""
        seed = random.Random(f"{self.config.seed} edit {step}").getrandbits(63)
        special = self.tokenizer.special_ids
        masked, _ = mask_tokens(ids, mask_id=self.tokenizer.mask_id, special_ids=special,
                                vocab_size=self.tokenizer.vocab_size, rate=self.config.rtd_rate,
                                generator=torch.Generator(ids.device).manual_seed(seed))
        plain = mask & ~torch.isin(ids, torch.tensor(special, device=ids.device))
        return torch.where(plain, self.guess(masked, mask), ids)

    def detect(self, edited: Tensor, mask: Tensor, h: Tensor) -> Tensor:
        """Original or replaced, two scores a token.     (2B, T), (2B, T), (2B, D) -> (2B, T, 2)"""
        x = self.discriminator.embed(edited, mask).with_first(h)
        return self.detector(self.discriminator.through(x)[-1])


def frozen_masked_lm(name: str, tokenizer: Tokenizer) -> Callable:
    """Reads every word of a sentence: ids, mask -> ids. In no state.pt, as it never changes."""
    folder = encoder_folder(name)
    if Tokenizer.read(folder).whole.get_vocab() != tokenizer.whole.get_vocab():
        raise ValueError(f"--generator {name}: expected the vocabulary of --encoder, found another "
                         "one: its words would be other words there")
    model = load(folder).eval()
    return partial(likeliest, model, load_masked_lm(folder, model).eval())


@torch.no_grad()
def likeliest(model: SentenceEncoder, lm_head: MaskedLMHead, ids: Tensor, mask: Tensor) -> Tensor:
    """The likeliest word at every real token.                     (B, T), (B, T) -> (B, T)"""
    rows = model.to(ids.device).encoder(ids, mask)[-1][mask]      # (R, D)
    lm_head.to(ids.device)
    # The scores of all tokens at once would fill half a gigabyte.
    words = [lm_head(some).argmax(dim=-1) for some in rows.split(1024)]
    return ids.masked_scatter(mask, torch.cat(words))


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


class CoreTuning(SimCSE):
    """The hardest pairs of a labelled batch are blended into still harder ones.

        positive+ = λ · hardest positive + (1 - λ) · hardest negative,   λ ~ Beta(a, a)
        negative+ = λ' · a stranger + (1 - λ') · the anchor,             λ' = max(Beta(a, a), 0.8)
        loss = η · many_positives(anchor; entailed, denied, positive+, negative+)
             + w · cross-entropy of a classifier of pairs: entailed, denied or unrelated

    In the style of Zhang et al. 2021 (NeurIPS), which fine-tunes on labelled images. Mixing, its
    place before the head and the focal loss are theirs. Taking equal premises for a class, and the
    pair classifier for theirs of images, are ours. The paper finds hardest positives; its released
    code does not (see `hard_pairs`). Without labels there is no such method here.
    """
    columns_taken = (2, 3)

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        width = model.config.width
        group = text_numbers(corpus.columns[0])
        self.register_buffer("group", group, persistent=False)    # (N,)
        self.project = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 256))
        self.classify = nn.Linear(3 * width, 3, bias=False)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        group, mixing = self.group[out.rows], self.config.mixing
        same = group[:, None] == group                            # (B, B)
        pairs = self.draw(out.anchor, torch.cat(out.columns[1:]), same, out.step)
        others = harder(*out.columns, same=same, pairs=pairs, mixing=mixing)
        self.parts, total = {}, 0
        for name, weight, term in (
                ("contrastive_loss", self.config.contrast_weight, self.contrast),
                ("classifier_loss", self.config.classifier_weight, self.classification)):
            if weight:
                found = term(out.anchor, others)
                self.parts[name], total = found.detach(), total + weight * found
        return total

    def draw(self, anchor: Tensor, candidates: Tensor, same: Tensor, step: int) -> HardPairs:
        return hard_pairs(anchor, candidates, same, alpha=self.config.mixing_alpha,
                          rng=np.random.default_rng([self.config.seed, step]))

    def contrast(self, anchor: Tensor, others: list[Others]) -> Tensor:             # -> ()
        """After a head of its own, which mixing comes before."""
        others = [other for other in others if other.counts is not None]
        x = self.project(torch.cat([other.vectors for other in others]))
        logits = cosine(self.project(anchor), x) / self.config.temperature          # (B, C)
        counts = torch.cat([other.counts for other in others], dim=1)
        return many_positives(logits.masked_fill(~counts, -math.inf),
                              torch.cat([other.positive for other in others], dim=1),
                              focus=self.config.focus)

    def classification(self, anchor: Tensor, others: list[Others]) -> Tensor:       # -> ()
        """Cross-entropy with soft labels, the mean over all pairs."""
        pairs = torch.cat([torch.cat([anchor, x.vectors, (anchor - x.vectors).abs()], dim=1)
                           for x in others])                      # (P, 3·D)
        labels = torch.cat([other.label.expand(len(anchor), 3) for other in others])
        return F.cross_entropy(self.classify(pairs), labels)


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


class PNR(SimCSE):
    """The model of the corpus before is both what is remembered and what is not to be repeated.

        loss = L(z, z'; f) + λ · L(g(z), f; z'),   L(a, p; o): InfoNCE of a among the positives p
                                                   and, as pseudo-negatives, the o of the others
    z, z': two views now; f: what the frozen previous model makes of the sentence; g: a predictor.

    Cha, Cho, Moon 2024, in the form of their MoCo code (the own f is no negative, no gradient
    through the z' of the second term) with the batch in place of its queue. Theirs are images;
    on text all is ours: f has no dropout, g normalizes by layer, one order of the views. On the
    first corpus it is SimCSE. `--pseudo-weight 0` leaves distillation alone, λ = 0 SimCSE with
    pseudo-negatives. Costs 1.2 steps of SimCSE.
    """
    columns_taken = (1,)

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__(corpus, config, model=model)
        width = model.config.width
        with torch.random.fork_rng(devices=[]):                   # the head is drawn as in SimCSE
            self.predictor = nn.Sequential(nn.Linear(width, 4 * width), nn.LayerNorm(4 * width),
                                           nn.ReLU(), nn.Linear(4 * width, width))
        # In a tuple, since what stands in one is no part of this module: neither trained nor saved.
        self.previous = ()

    def follow(self, model: SentenceEncoder) -> None:
        previous = deepcopy(model).eval().requires_grad_(False)
        previous.keep_head = True                                 # as it stood in the loss
        self.previous = (previous,)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        if not self.previous:
            return super().loss(out)
        batch, now = len(out.anchor), out.positive
        with torch.no_grad(), torch.autocast(out.ids.device.type, torch.bfloat16,
                                             enabled=out.bf16):
            before = self.previous[0](out.ids[:batch], out.mask[:batch]).to(now.dtype)   # (B, D)
        contrast = partial(pseudo_negative_nce, temperature=self.config.temperature,
                           pseudo_weight=self.config.pseudo_weight)
        learned = contrast(out.anchor, now, before)
        # `kept`: how far sentences are where the previous model had them.
        kept = F.cosine_similarity(out.anchor, before).mean()
        self.parts = {"plasticity_loss": learned.detach(), "kept": kept.detach()}
        if not self.config.distillation_weight:
            return learned
        remembered = contrast(self.predictor(out.anchor), before, now.detach())
        self.parts["stability_loss"] = remembered.detach()
        return learned + self.config.distillation_weight * remembered


METHODS = {"simcse": SimCSE, "is-cse": ISCSE, "infocse": InfoCSE, "sscl": SSCL, "kdmcse": KDMCSE,
            "twins": Twins, "diffcse": DiffCSE, "cards": CARDS, "debcse": DebCSE,
            "ifnd": IFND, "core-tuning": CoreTuning, "fedrcl": FedRCL, "pnr": PNR}


@dataclass(frozen=True)
class Paper:
    """A row of `--list`. Published averages: seven STS tasks, only those a dossier verified."""
    flags: str
    idea: str
    citation: str
    published: str


PAPERS = [
    Paper("--method simcse", "two dropout masks make two views of one sentence",
          "Gao, Yao, Chen: SimCSE. EMNLP 2021, arXiv 2104.08821",
          "BERT-base 76.25, -large 78.41; RoBERTa-base 76.57, -large 78.90"),
    Paper("--method simcse --corpus nli", "entailment as positive, contradiction as hard negative",
          "Gao, Yao, Chen: SimCSE. EMNLP 2021, arXiv 2104.08821",
          "BERT-base 81.57, -large 82.21; RoBERTa-base 82.52, -large 83.76"),
    Paper("--mlm-weight 0.1", "keep predicting masked words, for the sake of transfer tasks",
          "Gao, Yao, Chen: SimCSE. EMNLP 2021, arXiv 2104.08821",
          "none on STS: meant for transfer, costs 0.5 on STS-B dev (Table D.2)"),
    Paper("--method simcse --loss focal", "negatives that are close already push harder",
          "Hou, Li: Focal-InfoNCE. Findings of EMNLP 2023, arXiv 2310.06918",
          "BERT-base 77.32, -large 78.72; RoBERTa-base 77.58, -large 78.74"),
    Paper("--method is-cse", "positives smoothed over neighbours in a memory buffer",
          "He, Zhang, Lan, Zhang: IS-CSE. AAAI 2023, arXiv 2305.07424",
          "BERT-base 78.30, -large 79.47; RoBERTa-base 77.73, -large 79.42"),
    Paper("--method infocse", "the model annotates its own positives, inside documents",
          "Yang, Liu, Xiao, Lian, Wu, Lian, Sun, Xie: arXiv 2202.13802",
          "none verified; the algorithm is ours, after the abstract"),
    Paper("--method sscl", "lower layers as negatives, against over-smoothing",
          "Chen, Shou, Pei, Gong, Cao, Chang, Li, Jiang: SSCL. ACL 2023, arXiv 2305.06154",
          "BERT-base 77.90, -large 79.69 (the means of its own rows: 77.75, 79.59)"),
    Paper("--method kdmcse --teacher ENCODER", "a teacher's likeness sets the margin of a negative",
          "Nguyen, Nguyen, Wu, Luu: KDMCSE. NAACL 2024, arXiv 2403.17486",
          "none on text alone: theirs are with images and captions"),
    Paper("--method twins --teacher ENCODER", "changed texts are positives that keep their margin",
          "Xiao, Li, Chen: Identical and Fraternal Twins. arXiv 2307.10932",
          "none verified; the formulas are ours, after the abstract"),
    Paper("--method diffcse", "the sentence vector tells which words were replaced",
          "Chuang, Dangovski, Luo et al.: DiffCSE. NAACL 2022, arXiv 2204.10298",
          "BERT-base 78.49; RoBERTa-base 78.21 (with distilled masked LMs as --generator)"),
    Paper("--method cards", "case-switched positives, nearest sentences as negatives",
          "Wang, Ge, Zhang, Yang: CARDS. SIGIR 2022, arXiv 2206.02457",
          "RoBERTa-base 78.83, -large 80.84 (their released models; none for BERT)"),
    Paper("--method debcse --teacher ENCODER", "pairs drawn by inverse propensity, against bias",
          "Miao, Du, Zhang: DebCSE. CIKM 2023, arXiv 2309.07396",
          "BERT-base 80.33 (theirs; the formulas here are ours, after the abstract)"),
    Paper("--method ifnd", "negatives of the anchor's cluster are left out, the surest first",
          "Chen, Hung, Tseng, Chien, Yang: IFND. ICLR 2022, arXiv 2106.03719",
          "none on text: theirs is on images"),
    Paper("--method core-tuning --corpus nli", "the hardest pairs are mixed into harder ones",
          "Zhang, Hooi, Hu, Liang, Feng: Core-tuning. NeurIPS 2021, arXiv 2102.06605",
          "none on text: theirs is on images"),
    Paper("--method fedrcl --clients 8", "a class attracts but must not collapse, client by client",
          "Seo, Kim, Kim, Han: FedRCL. CVPR 2024, arXiv 2401.04928",
          "none on text: theirs are of images"),
    Paper("--method pnr --corpus A B", "the model of the last corpus as teacher and as negatives",
          "Cha, Cho, Moon: PNR. ICML 2024, arXiv 2306.05101",
          "none on text: theirs are of images"),
    Paper("python pruning.py RUN", "heads and neurons that matter least to alignment and "
          "uniformity are removed", "An, Zhang, Song: SparseCSE. arXiv 2311.03881",
          "none verified; the units and the score are those of the authors' StarK"),
]


def check(config, columns: int, *, layers: int | None = None) -> None:
    """Refuse what makes no sense for a corpus of so many columns, an encoder of so many layers."""
    taken = METHODS[config.method].columns_taken
    if columns not in taken:
        other = "without hard negatives" if columns > max(taken) else "of pairs, such as nli"
        raise ValueError(f"--method {config.method} takes a corpus of "
                         f"{' or '.join(map(str, taken))} columns, found {columns} in "
                         f"{config.corpus}: use --method simcse, or a file {other}")
    if columns == 3 and config.loss == "focal":
        raise ValueError(f"--loss focal is defined without labels, but {config.corpus} has hard "
                         "negatives (3 columns): use --loss info-nce, or a corpus of sentences")
    if columns > 1 and config.positives != "dropout":
        raise ValueError(f"--positives {config.positives} makes positives, but {config.corpus} "
                         f"brings its own ({columns} columns): use --positives dropout")
    if config.method == "is-cse":
        check_buffer(config)
    if config.head == "keep" and METHODS[config.method].head is not Head:
        raise ValueError(f"--head keep: the head of --method {config.method} serves training only: "
                         "use --head train")
    if config.method == "sscl":
        check_layers(config, layers)
    if config.method == "cards":
        check_retrieval(config)
    if config.method == "debcse" and config.positives != "dropout":
        raise ValueError(f"--method debcse draws positives of its own, found --positives "
                         f"{config.positives}: use --positives dropout")
    attracts = config.method == "ifnd" and config.false_negatives == "attract"
    if attracts and config.loss != "info-nce":
        raise ValueError(f"--false-negatives attract has its own loss, found --loss {config.loss}: "
                         "use --loss info-nce, or --false-negatives eliminate")
    if config.method == "core-tuning":
        check_core_tuning(config)
    if config.method in ("fedrcl", "pnr") and config.loss != "info-nce":
        raise ValueError(f"--method {config.method} has a loss of its own, found --loss "
                         f"{config.loss}: use --loss info-nce")
    check_fedrcl(config, layers)
    check_teacher(config)


def check_core_tuning(config) -> None:
    """Core-tuning has a loss and a head of its own, and no weight on hard negatives."""
    for name, only in (("loss", "info-nce"), ("hard_negative_weight", 1), ("head", "none")):
        if getattr(config, name) not in (only, "recipe"):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--method core-tuning has a loss and a head of its own, found {flag} "
                             f"{getattr(config, name)}: use {flag} {only}, or --method simcse")
    if not config.contrast_weight + config.classifier_weight:
        raise ValueError("--contrast-weight and --classifier-weight are both 0, so there is "
                         "nothing to learn: use --contrast-weight 1")


def check_buffer(config) -> None:
    """IS-CSE's buffer must hold a batch and more rows than the neighbours asked for."""
    if not max(config.batch_size, config.neighbours + 1) <= config.buffer_size:
        raise ValueError(f"--buffer-size {config.buffer_size} must be at least the batch size "
                         f"({config.batch_size}) and more than --neighbours ({config.neighbours})")


def check_retrieval(config) -> None:
    """CARDS draws its negatives without repeats."""
    if config.retrieved > config.retrieve_from:
        raise ValueError(f"--retrieved {config.retrieved} must be at most --retrieve-from "
                         f"({config.retrieve_from}), of which they are drawn")


def check_layers(config, layers: int | None) -> None:
    """SSCL's negatives are layers: not the last, which makes the anchors, nor the embeddings."""
    if layers is not None and config.layers_as_negatives >= layers:
        raise ValueError(f"--layers-as-negatives: expected at most {layers - 1}, since "
                         f"{config.encoder} has {layers} layers and the last one makes the "
                         f"anchors, found {config.layers_as_negatives}")


def check_teacher(config) -> None:
    """KDMCSE learns from a teacher, with a loss of its own; most other methods take none."""
    if config.method != "kdmcse":
        if config.teacher and config.method not in ("twins", "debcse"):
            raise ValueError(f"--teacher {config.teacher}: --method {config.method} does not "
                             "learn from one: use --method kdmcse, or leave it out")
        return
    if not config.teacher:
        raise ValueError("--method kdmcse learns from a teacher: give --teacher a file of vectors "
                         "(.npy, .safetensors), an encoder's folder, a Hub id, or mini")
    if config.loss != "info-nce":
        raise ValueError(f"--method kdmcse has its own loss, InfoNCE with a margin on negatives, "
                         f"found --loss {config.loss}: use --loss info-nce")


def check_fedrcl(config, layers: int | None) -> None:
    """FedRCL compares pooled layers by a loss of its own, and one of its terms must count."""
    if config.method != "fedrcl":
        return
    if layers is not None and config.levels > layers:
        raise ValueError(f"--levels: expected at most {layers}, the layers of {config.encoder}, "
                         f"found {config.levels}")
    if config.head != "none":
        raise ValueError(f"--method fedrcl compares layers without a head, found --head "
                         f"{config.head}: use --head none")
    if not (config.ce_weight or config.scl_weight or config.penalty_weight):
        raise ValueError("--ce-weight, --scl-weight, --penalty-weight: expected one above 0, found "
                         "0 for each: nothing would be learned")

"""
What does a paper make of a batch? One short class per paper.

A method is the paper's algorithm box around one encoder forward:

    rows of the corpus --views--> V columns of B texts --the encoder--> V x (B, D) --loss--> scalar

`SimCSE` is the base; every other paper overrides what it changes, and nothing else. Here are those
that change what happens to a batch. Not here: papers that look at the whole corpus first
(corpus_methods.py), the menu and what goes together (papers.py).
"""

import inspect
import math
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import Tokenizer, encoder_folder, mask_tokens
from devices import Pieces
from folders import load, load_masked_lm
from losses import (LOSSES, angular_margin_nce, cosine, detection_loss, many_positives,
                    pseudo_negative_nce)
from model import POOLINGS, Head, MaskedLMHead, Projector, SentenceEncoder
from negatives import by_chance
from positives import POSITIVES, HardPairs, MemoryBuffer, Others, hard_pairs, harder, text_numbers


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
    static = False                    # does `prepare` find the same for every seed, for good?
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

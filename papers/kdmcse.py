"""
KDMCSE: the less similar a teacher finds two sentences, the harder they must be told apart.

Unlike SimCSE: every negative has a margin; pairs that the teacher finds too similar are none.
    prepare   the teacher's vectors of all rows, in half precision
    loss      InfoNCE with margins: of the two views, and of each view with the teacher's vectors

Nguyen, Nguyen, Wu, Luu: NAACL 2024, arXiv 2403.17486. In its style only: their teacher is CLIP, and
captions with images alternate with plain sentences; one text encoder as the teacher of all is ours,
and so is the threshold `by_chance`. The formula of the margin, grounding and λ are as in the
authors' code. That code differs twice: all negatives of the other view have the margin 0.15, and
its scripts leave the filter off. A step costs 1.01 times SimCSE's, and before the first the teacher
encodes the corpus into 2·N·D bytes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from engine.flags import Row, flag
from losses import cosine, pick_own
from model import POOLINGS
from papers import settings
from papers.corpus import index, open_teacher
from papers.simcse import Encoded, SimCSE


@dataclass(frozen=True)
class Config(settings.Config):
    teacher: str = flag("", "kdmcse", "encoder to learn from, or an .npy: a vector for each row")
    angular_margin: float = flag(
        0.125, "kdmcse", "m, radians by which a negative comes nearer that is unrelated to the "
        "teacher (0.15 in their scripts)", least=0, most=1.5, why=", below a right angle")
    teacher_threshold: float = flag(
        0.0, "kdmcse", "teacher's similarity above which a pair is no negative; 1: no filter; "
        "0: set so for 1 random pair in 1000 (ours)", least=0, most=1)
    grounding_weight: float = flag(
        0.01, "kdmcse", "λ of the contrast with the teacher's vectors (their code)", least=0)


class KDMCSE(SimCSE):
    """loss = L(z, z') + λ · ½ Σ_v L(g(pooled view v), t(teacher))

    L is InfoNCE of the cosines of `nearer_negatives`, without the pairs that are no negatives; g
    and t are projection heads.
    """
    Config = Config
    rows = [Row("--method kdmcse --teacher ENCODER", "a teacher sets the margin of a negative",
                "Nguyen, Nguyen, Wu, Luu: KDMCSE. NAACL 2024, arXiv 2403.17486",
                "none on text alone: theirs are with images and captions")]
    recipes = {"base": dict(epochs=3),                            # their run scripts
               "roberta-base": dict(batch_size=128),              # ours, and the next
               "large": dict(batch_size=64, learning_rate=1e-5, epochs=3)}
    columns_taken = (1,)
    losses_taken = ("info-nce",)
    toy = dict(teacher="mini")

    @classmethod
    def check(cls, config, corpora, shape) -> None:
        if not config.teacher:
            raise ValueError("--method kdmcse learns from a teacher: give --teacher an encoder's "
                             "folder, a Hub id, mini, or a file of vectors (.npy)")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        self.pool = POOLINGS[model.pooling]
        self.ask, texts = open_teacher(config, corpus), corpus.columns[0]
        width = self.ask(texts[:1]).shape[1]
        self.register_buffer("teacher", torch.zeros(len(texts), width).half())      # (N, Dt)
        self.student_head, self.teacher_head = (                  # g, t
            nn.Sequential(nn.Linear(each, 256), nn.Tanh()) for each in (model.config.width, width))

    def prepare(self, encode: Callable) -> None:
        self.teacher.copy_(index(self.ask, self.corpus.columns[0]))

    @cached_property
    def threshold(self) -> float:
        return self.config.teacher_threshold or by_chance(self.teacher, self.config.seed)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        teacher = self.teacher[out.rows].to(out.anchor.dtype)                       # (B, Dt)
        similarity = cosine(teacher, teacher).clamp(max=1)                          # (B, B)
        own = torch.eye(len(teacher), dtype=torch.bool, device=teacher.device)
        kept = (similarity <= self.threshold) | own                                 # (B, B)

        def margin_nce(view: Tensor, target: Tensor) -> Tensor:   # (B, D), (B, D) -> ()
            cosines = nearer_negatives(cosine(view, target), similarity,
                                       angular_margin=self.config.angular_margin)
            return pick_own(cosines / self.config.temperature, kept.to(cosines.dtype))

        instance = margin_nce(out.anchor, out.positive)
        self.terms = {"instance_loss": instance.detach(),
                      "dropped_pairs": (~kept).sum() / (len(kept) ** 2 - len(kept))}
        if not self.config.grounding_weight:
            return instance
        pooled = self.pool(out.hidden, out.mask).to(teacher.dtype)                  # (2B, D)
        target = self.teacher_head(teacher)                                         # (B, 256)
        views = self.student_head(pooled).chunk(2)                # 2 x (B, 256)
        grounding = sum(margin_nce(view, target) for view in views) / 2
        self.terms["grounding_loss"] = grounding.detach()
        return instance + self.config.grounding_weight * grounding


def nearer_negatives(cosines: Tensor, similarity: Tensor, *, angular_margin: float) -> Tensor:
    """Cosines with every negative moved nearer by an angle: the less similar, the more.

        cos(θ_ij - m |1 - A_ij|)  where i != j and θ_ij > m, else cos θ_ij    (B, B)s -> (B, B)

    A is the teacher's similarity, θ the student's angle: AdapACSE, after the authors' code. Written
    cos θ cos d + sin θ sin d, d being what is subtracted: arccos has no gradient at 1.
    """
    nearer = angular_margin * (1 - similarity).abs()              # (B, B), radians
    own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    inside = cosines.clamp(-1 + 1e-7, 1 - 1e-7)                   # or the root has none, either
    moved = inside * nearer.cos() + (1 - inside.square()).sqrt() * nearer.sin()
    return torch.where((cosines < math.cos(angular_margin)) & ~own, moved, cosines)


def by_chance(rows: Tensor, seed: int) -> float:                  # (N, D) -> ()
    """The cosine that 1 random pair in 1000 exceeds, at least 0.5: it differs between teachers."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(rows), (10_000,), generator=generator)
    away = torch.randint(1, len(rows), (10_000,), generator=generator)              # never itself
    similarity = F.cosine_similarity(rows[first].float(), rows[(first + away) % len(rows)].float())
    return max(similarity.quantile(0.999).item(), 0.5)

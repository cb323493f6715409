"""One solution of each exercise. There are others: the tests decide."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import losses
from engine.flags import Row, flag
from model import SentenceEncoder
from papers import settings
from papers.simcse import Encoded, SimCSE


def info_nce(anchor: Tensor, positive: Tensor, *, temperature: float) -> Tensor:
    cosines = F.normalize(anchor, dim=1) @ F.normalize(positive, dim=1).T           # (B, B)
    return -(cosines / temperature).log_softmax(dim=1).diagonal().mean()


def push_shares(anchor: Tensor, positive: Tensor, *, temperature: float) -> Tensor:
    logits = losses.cosine(anchor, positive) / temperature                          # (B, B)
    return logits.fill_diagonal_(-torch.inf).softmax(dim=1)


def symmetric(anchor: Tensor, positive: Tensor, *, temperature: float) -> Tensor:
    return (losses.info_nce(anchor, positive, temperature=temperature)
            + losses.info_nce(positive, anchor, temperature=temperature)) / 2


def two_views(model: SentenceEncoder, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    model.train()
    return tuple(model(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2))


def broken_views(model: SentenceEncoder, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    model.train()
    views = []
    for _ in range(2):
        torch.manual_seed(0)
        views.append(model(ids, mask))
    return tuple(views)


def uniformity(x: Tensor) -> Tensor:
    squared = torch.pdist(F.normalize(x, dim=1)).square()         # (B (B - 1) / 2,)
    return (-2 * squared).exp().mean().log()


def max_pooling(hidden: list[Tensor], mask: Tensor) -> Tensor:
    return hidden[-1].masked_fill(~mask[:, :, None], -torch.inf).amax(dim=1)        # (B, D)


def hard_info_nce(anchor: Tensor, positive: Tensor, hard: Tensor, *, alpha: float,
                  temperature: float) -> Tensor:
    ones = torch.ones(len(anchor), len(anchor))
    weight = torch.cat([ones, ones.clone().fill_diagonal_(alpha)], dim=1)           # (B, 2B)
    return losses.info_nce(anchor, torch.cat([positive, hard]), temperature=temperature,
                           weight=weight)


def true_negatives(ids: Tensor) -> Tensor:
    same = (ids[:, None] == ids).all(dim=-1)                                        # (B, B)
    return (~same).float().fill_diagonal_(1)


def my_view(sentence: str, rng: random.Random, *, rate: float) -> str:
    """Some words are typed with their second and third letter swapped: "shoes" -> "sohes"."""
    return " ".join(word[0] + word[2] + word[1] + word[3:]
                    if len(word) > 3 and rng.random() < rate else word for word in sentence.split())


@dataclass(frozen=True)
class Config(settings.Config):
    uniformity_weight: float = flag(0.5, "geometry", "weight w of uniformity (ours)", least=0)


class Geometry(SimCSE):
    Config = Config
    rows = [Row("--method geometry", "alignment and uniformity as the loss", "after Wang, Isola: "
                "Alignment and Uniformity. ICML 2020, arXiv 2005.10242", "none")]
    columns_taken = (1, 2)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        near = losses.alignment(out.anchor, out.positive)
        spread = losses.uniformity(torch.cat([out.anchor, out.positive]))
        self.terms = {"alignment_loss": near.detach(), "uniformity_loss": spread.detach()}
        return near + self.config.uniformity_weight * spread

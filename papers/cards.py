"""
CARDS: each sentence learns to differ from the sentences of the corpus that look most like it.

Unlike SimCSE: words of the positive may have the case of their first letter switched, and sentences
from the whole corpus join the batch as negatives.
    prepare   the K nearest of every sentence, once, for the untrained encoder and mean pooling
    views     the sentence, its positive, and s of its K nearest, drawn anew at every step
    loss      InfoNCE of the anchors among all positives and all that the batch retrieved

Wang, Ge, Zhang, Yang: SIGIR 2022, arXiv 2206.02457. In the authors' code K counts the sentence
itself (65 and 9). Their positives are made of decoded tokens. They find the anchor among the
retrieved by its row number, we by its tokens. They can repeat the search; we never do. Ours: texts
that differ by case and white space only are one text. A step costs 1 + s/2 times SimCSE's, and the
search an encoding of the corpus and 2·N²·D operations.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.flags import Row, flag, pick_device
from papers import settings
from papers.corpus import index, nearest_others, text_numbers
from papers.simcse import Encoded, SimCSE


@dataclass(frozen=True)
class Config(settings.Config):
    retrieved: int = flag(1, "cards", "negatives drawn for a sentence, s (their README)", least=0)
    retrieve_from: int = flag(64, "cards", "nearest sentences that they are drawn from, K (recipe)",
                              least=1)


# The last search, shared by the seeds of one command; only one, as a table may take 240 MB.
FOUND: dict[tuple, Tensor] = {}


class CARDS(SimCSE):
    """Retrieved sentences are encoded with the batch, as they were read, and with gradient."""
    Config = Config
    rows = [Row("--method cards", "case-switched positives, nearest sentences as negatives",
                "Wang, Ge, Zhang, Yang: CARDS. SIGIR 2022, arXiv 2206.02457",
                "RoBERTa-base 78.83, -large 80.84 (their released models; none for BERT)")]
    recipes = {                                                   # their README, for RoBERTa
        "base": dict(positives="switch-case", rate=0.05),
        "large": dict(positives="switch-case-quota", rate=0.1, retrieve_from=8),
        "roberta-base": dict(batch_size=512, learning_rate=4e-5),
        "roberta-large": dict(batch_size=512, learning_rate=7.5e-6),
        "small": dict(positives="switch-case", rate=0.05),        # ours
    }
    columns_taken = (1,)
    hard_negatives = True             # --hard-negative-weight is e^β of the authors' code
    for_views = ("nearest",)
    needs = {"retrieve_from": "retrieved"}
    toy = dict(retrieve_from=8)

    @classmethod
    def check(cls, config, corpora, shape) -> None:
        if config.retrieved > config.retrieve_from:
            raise ValueError(f"--retrieved {config.retrieved} must be at most --retrieve-from "
                             f"({config.retrieve_from}), of which they are drawn")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        self.number = text_numbers(corpus.columns[0]).tolist()    # row -> its text
        first = {}
        for number, text in zip(self.number, corpus.columns[0]):
            first.setdefault(number, text)
        self.texts = list(first.values())
        if config.retrieved and config.retrieve_from >= len(first):
            raise ValueError(f"--retrieve-from {config.retrieve_from}: expected at most "
                             f"{len(first) - 1}, as {config.corpus} has {len(first)} sentences")
        nearest = torch.zeros(len(first), config.retrieve_from, dtype=torch.int32)
        self.register_buffer("nearest", nearest)                  # (N, K)
        self.search = self.search if config.retrieved else None

    def prepare(self, encode: Callable) -> None:
        if not self.config.retrieved:
            return
        key = (self.corpus.sha256, len(self.texts), self.config.encoder,
               self.config.retrieve_from, self.config.max_tokens)
        if key not in FOUND:
            ask = partial(encode, pooling="mean", max_tokens=self.config.max_tokens)
            FOUND.clear()
            FOUND[key] = self.search(index(ask, self.texts))
        self.nearest.copy_(FOUND[key])

    def search(self, vectors: Tensor) -> Tensor:                  # (N, D) -> (N, K)
        return nearest_others(vectors, self.config.retrieve_from,
                              device=pick_device(self.config.device))

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        near = self.nearest[[self.number[row] for row in rows]].tolist()            # B x K
        picks = [rng.sample(numbers, self.config.retrieved) for numbers in near]    # B x s
        retrieved = [[self.texts[number] for number in column] for column in zip(*picks)]
        return super().views(rows, rng) + retrieved

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        batch, (anchor, positive, *retrieved) = len(out.anchor), out.columns
        if not retrieved:
            return self.contrast(out)
        weight = candidate_weight(out.ids[:batch], out.ids[2 * batch :],
                                  alpha=self.config.hard_negative_weight)
        own = torch.stack([F.cosine_similarity(anchor, column) for column in retrieved])
        self.terms = {"retrieved_cosine": own.mean().detach()}    # falls, if they are learned
        return self.loss_of(anchor, torch.cat([positive, *retrieved]), weight=weight)


def candidate_weight(anchors: Tensor, retrieved: Tensor, *, alpha: float = 1.0) -> Tensor:
    """How much each candidate counts: (B, T) anchors, (s·B, T) retrieved -> (B, B + s·B).

    α for what the anchor itself retrieved, 0 for a text of the anchor's own tokens, else 1.
    """
    batch, each = len(anchors), len(retrieved) // len(anchors)
    own = torch.eye(batch, device=anchors.device).repeat(1, each)                   # (B, s·B)
    itself = (anchors[:, None] == retrieved).all(dim=-1)                            # (B, s·B)
    weight = (1 + (alpha - 1) * own).masked_fill(itself, 0)
    return torch.cat([torch.ones_like(weight[:, :1]).expand(-1, batch), weight], dim=1)

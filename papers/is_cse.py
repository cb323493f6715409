"""
IS-CSE: a sentence must find its positive, and also a blend of the positive and its neighbours.

Unlike SimCSE: a second InfoNCE has each positive averaged with the nearest positives of the last
steps. The reason: to treat every sentence as a class of its own is over-confident.
    loss    InfoNCE among the positives, and α times InfoNCE among the smoothed ones

He, Zhang, Lan, Zhang: AAAI 2023, arXiv 2305.07424. As in the authors' code, a neighbour may be of
the same batch. Their code leaves hard negatives out of the loss; here a corpus with a third column
is refused. A step takes 1.04 times as long as SimCSE's with the built-in encoder.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.flags import Row, flag
from papers import settings
from papers.memory import Memory
from papers.simcse import Encoded, SimCSE


@dataclass(frozen=True)
class Config(settings.Config):
    buffer_size: int = flag(1024, "is-cse", "M, positives remembered (their code)", least=1)
    neighbours: int = flag(16, "is-cse", "K, others blended into a positive (their code)", least=0)
    smoothing_temperature: float = flag(2.0, "is-cse", "β of the blend (their code)", above=0)
    alpha_start: float = flag(0.1, "is-cse", "smoothed term's weight at first (recipe)", least=0)
    alpha_end: float = flag(0.1, "is-cse", "its weight after mid-training (recipe)", least=0)


class ISCSE(SimCSE):
    """loss = L(anchor, positive) + α(t) · L(anchor, smoothed positive)"""
    Config = Config
    rows = [Row("--method is-cse", "positives smoothed over neighbours in a memory buffer",
                "He, Zhang, Lan, Zhang: IS-CSE. AAAI 2023, arXiv 2305.07424",
                "BERT-base 78.30, -large 79.47; RoBERTa-base 77.73, -large 79.42")]
    recipes = {"large": dict(alpha_start=0.005, alpha_end=0.05)}  # their run scripts
    columns_taken = (1, 2)
    toy = dict(buffer_size=20, neighbours=3)

    @classmethod
    def check(cls, config, corpora, shape) -> None:
        if max(config.batch_size, config.neighbours + 1) > config.buffer_size:
            raise ValueError(f"--buffer-size {config.buffer_size} must be at least the batch size "
                             f"({config.batch_size}) and more than --neighbours "
                             f"({config.neighbours})")
        if config.alpha_end < config.alpha_start:
            raise ValueError(f"--alpha-end: expected at least --alpha-start, {config.alpha_start}, "
                             f"found {config.alpha_end}")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        self.memory = Memory(config.buffer_size, model.config.width)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        self.memory.push(out.positive)
        instance = self.contrast(out)
        smoothed = smooth(out.positive, self.memory.rows, neighbours=self.config.neighbours,
                          temperature=self.config.smoothing_temperature)            # (B, D)
        # Until the memory is full, at step M / B, empty slots could be among the neighbours.
        smoothing = self.loss_of(out.anchor, smoothed).where(self.memory.full, 0)
        self.terms = {"instance_loss": instance.detach(), "smoothing_loss": smoothing.detach()}
        return instance + smoothing * alpha(out.step, out.steps, start=self.config.alpha_start,
                                            end=self.config.alpha_end)


def smooth(x: Tensor, memory: Tensor, *, neighbours: int = 16, temperature: float = 2.0) -> Tensor:
    """Blend each embedding with its nearest memories.            (B, D), (M, D) -> (B, D)

        g = Σ_m w_m k_m,   w = softmax(x · k_m / β),   k = x and its K nearest memories

    The nearest memory of all is the copy of x pushed just before, so it is left out. At β = 2 the
    scores lie within ±0.5, so the blend is close to a plain mean.
    """
    x = F.normalize(x, dim=-1)                                                      # (B, D)
    ranks = (x.detach() @ memory.mT).topk(neighbours + 1).indices                   # (B, 1 + K)
    group = torch.cat([x[:, None], memory[ranks[:, 1:]]], dim=1)                    # (B, 1 + K, D)
    weight = (group @ x[:, :, None] / temperature).softmax(dim=1)                   # (B, 1 + K, 1)
    return (weight * group).sum(dim=1)                                              # (B, D)


def alpha(step: int, steps: int, *, start: float, end: float) -> float:
    """The smoothed term's weight: low while neighbours are poor, constant from mid-training on."""
    return end - max(math.cos(math.pi * (step - 1) / steps), 0) * (end - start)

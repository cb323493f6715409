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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from losses import LOSSES
from model import SentenceEncoder
from positives import POSITIVES, MemoryBuffer


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
    hidden: list[Tensor] | None = None   # L + 1 x (V·B, T, D); of the last layer maybe T = 1

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

    def __init__(self, corpus, config, *, model: SentenceEncoder):
        super().__init__()
        self.corpus, self.config = corpus, config
        self.view = bind(POSITIVES[config.positives], config)
        self.loss_of = bind(LOSSES[config.loss], config)

    def prepare(self, encode: Callable, seed: int) -> None:
        """Look at the whole corpus with the present encoder, once before the first step."""

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
        """Figures worth a line in metrics.jsonl, beside those of every method."""
        return {}


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

    def logs(self) -> dict[str, float]:
        return {name: loss.item() for name, loss in self.parts.items()}


METHODS = {"simcse": SimCSE, "is-cse": ISCSE}


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
]


def check(config, columns: int) -> None:
    """Refuse a combination that makes no sense for a corpus of that many columns."""
    taken = METHODS[config.method].columns_taken
    if columns not in taken:
        raise ValueError(f"--method {config.method} takes a corpus of "
                         f"{' or '.join(map(str, taken))} columns, found {columns} in "
                         f"{config.corpus}: use --method simcse, or a file without hard negatives")
    if columns == 3 and config.loss == "focal":
        raise ValueError(f"--loss focal is defined without labels, but {config.corpus} has hard "
                         "negatives (3 columns): use --loss info-nce, or a corpus of sentences")
    if columns > 1 and config.positives != "dropout":
        raise ValueError(f"--positives {config.positives} makes positives, but {config.corpus} "
                         f"brings its own ({columns} columns): use --positives dropout")
    if config.method == "is-cse":
        check_buffer(config)


def check_buffer(config) -> None:
    """IS-CSE's buffer must hold a batch and more rows than the neighbours asked for."""
    if not max(config.batch_size, config.neighbours + 1) <= config.buffer_size:
        raise ValueError(f"--buffer-size {config.buffer_size} must be at least the batch size "
                         f"({config.batch_size}) and more than --neighbours ({config.neighbours})")

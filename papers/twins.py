"""
Twins: a changed text is a positive too, but stays as far off as its meaning is.

Unlike SimCSE: positives are of two kinds, and a loss keeps the gap between them.
    prepare   the innate margin of every row: 1 - a teacher's cosine of text and changed text
    views     the sentence, its identical twin (the same text), its fraternal twin (a changed one)
    loss      InfoNCE of both kinds, and how far the gap is from the innate margin
Identical twins of past batches stay on as negatives in a queue, but only after step 500, since the
encoder changes too fast before; the 150 steps of a small encoder have no queue.

Xiao, Li, Chen: arXiv 2307.10932 (2023), where it is called IFTCL; known to us by its abstract,
so in its style only: two kinds of positives, the margin and the queue are theirs; formulas, changes
of text and sizes are ours. A step costs 1.5 times SimCSE's; before, every row is encoded twice.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from engine.flags import Row, complain, flag
from papers import settings
from papers.corpus import open_teacher, rows_of_run
from papers.memory import Memory
from papers.simcse import Encoded, SimCSE
from papers.views import crop, delete_words, repeat_words, swap_words

CHANGES = [partial(repeat_words, rate=0.32), partial(delete_words, rate=0.15),
           partial(swap_words, rate=0.1), partial(crop, rate=0.3)]


@dataclass(frozen=True)
class Config(settings.Config):
    teacher: str = flag("", "twins", "encoder that measures innate margins; default: --encoder")
    twins_weight: float = flag(1.0, "twins", "λ of the loss that keeps the gap (ours)", least=0)
    queue_batches: int = flag(2, "twins", "past batches that stay negatives, but only after step "
                              "500 (ours)", least=0)


class Twins(SimCSE):
    """loss = ½ L(anchor, identical) + ½ L(anchor, fraternal) + λ · mean_i (gap_i - m_i)²

        gap_i = cos(anchor_i, identical_i) - cos(anchor_i, fraternal_i)

    λ grows over the first tenth of the run. The queue joins the candidates of both L. The gap and
    the innate margin m are differences of cosines, not divided by the temperature.
    """
    Config = Config
    rows = [Row("--method twins --teacher ENCODER",
                "changed texts are positives that keep their margin",
                "Xiao, Li, Chen: Identical and Fraternal Twins. arXiv 2307.10932",
                "none verified; the formulas are ours, after the abstract")]
    recipes = {"roberta-base": dict(batch_size=128, learning_rate=1e-5),            # ours, all
               "small": dict(batch_size=128)}
    columns_taken = (1,)
    all_rows = False
    # Steps (ours): queued vectors were made by older weights, which change most at first.
    queue_starts = 500

    @classmethod
    def check(cls, config, corpora, shape) -> None:
        """Tell the user, without refusing, that a short run has no use for its queue."""
        steps = settings.count_steps(config, len(corpora[0]))
        if config.queue_batches and steps <= cls.queue_starts:
            complain(f"NOTICE: --queue-batches {config.queue_batches} has no effect: the queue "
                     f"counts only after step {cls.queue_starts}, and the run has {steps}")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        # Kept as a function, not as a submodule, so that it is not saved.
        self.teacher = open_teacher(config, corpus) if config.teacher else None
        slots = config.queue_batches * config.batch_size
        self.register_buffer("margins", torch.zeros(len(corpus)))                   # (N,)
        self.register_buffer("queued", torch.full((slots,), -1))                    # (M,) row or -1
        self.queue = Memory(slots, model.config.width)            # (M, D)

    def prepare(self, encode: Callable) -> None:
        """The innate margin of every row that the run will see."""
        if not self.teacher:
            complain(f"the innate margins come from {self.config.encoder}; if that was never "
                     "trained on sentences, all are near 0: use --teacher with one that was")
        # Texts end where training cuts them: what is not seen makes no difference. There is no
        # dropout: with it even equal texts have a cosine below 1, and margins would be too large.
        ask = partial(self.teacher or encode, max_tokens=self.config.max_tokens)
        texts, rows = self.corpus.columns[0], rows_of_run(len(self.margins), self.config)
        for start in tqdm(range(0, len(rows), 4096), disable=None, desc="margins", unit="chunk"):
            some = rows[start : start + 4096]
            margin = innate_margin(ask([texts[row] for row in some]),
                                   ask([self.fraternal(row) for row in some]))
            self.margins[some] = margin.to(self.margins)

    def fraternal(self, row: int) -> str:
        """The changed text of a row, always the same, since its margin was measured once."""
        rng = random.Random(f"{self.config.seed} twin {row}")
        change = rng.choice(CHANGES) if self.config.positives == "dropout" else self.view
        return change(self.corpus.columns[0][row], rng)

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        texts = [self.corpus.columns[0][row] for row in rows]
        return [texts, texts, [self.fraternal(row) for row in rows]]

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        anchor, identical, fraternal = out.columns
        # Empty places of the queue never count, nor does the anchor's own sentence.
        counts = (self.queued >= 0) & (self.queued != out.rows[:, None])            # (B, M)
        counts = (counts & (out.step > self.queue_starts)).to(anchor.dtype)
        weight = F.pad(counts, (len(anchor), 0), value=1.0)       # (B, B + M)
        contrast = sum(self.loss_of(anchor, torch.cat([twin, self.queue.rows]), weight=weight)
                       for twin in (identical, fraternal)) / 2
        gap = F.cosine_similarity(anchor, identical) - F.cosine_similarity(anchor, fraternal)
        margin = self.margins[out.rows]                           # (B,), as gap
        twins = (gap - margin).square().mean()
        if len(self.queued):                                      # after the loss, which has them
            self.queue.push(identical)
            self.queued = torch.cat([self.queued[len(anchor):], out.rows])
        self.terms = {"contrastive_loss": contrast.detach(), "twins_loss": twins.detach(),
                      "gap": gap.detach().mean(), "innate_margin": margin.mean()}
        ramp = min(1, out.step / (0.1 * out.steps))               # the first gaps are noise
        return contrast + self.config.twins_weight * ramp * twins


def innate_margin(x: Tensor, changed: Tensor) -> Tensor:          # (B, D), (B, D) -> (B,)
    """How far a change took each text, to a teacher: m_i = 1 - cos(x_i, changed_i), in 0 to ½."""
    return (1 - F.cosine_similarity(x, changed, dim=-1)).clamp(0, 0.5)

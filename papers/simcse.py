"""
SimCSE: a sentence must recognise itself, encoded twice, among the other sentences of its batch.

    views     every sentence twice; or the pairs and hard negatives of the corpus
    loss      InfoNCE of the anchors among all other columns, perhaps with a masked-LM term

Unlike what came before: dropout alone makes two views of a sentence differ, so no text is changed.
Gao, Yao, Chen: EMNLP 2021, arXiv 2104.08821. Eq. 4 without labels, eq. 5 with them, eq. 8 with a
weight on the own hard negative. Defaults: tables A.1, D.1 and their scripts.

Every other page of this folder says what it changes of this one. Words, on all pages:

    row         a sentence of the corpus, or a pair or triple, by its number
    view        one of the texts that stand for a row: the sentence, a changed one, its partner
    column      one view of all rows of a batch: the first are anchors, the second positives
    anchor      the view that asks; its positive is the answer, its negatives all other candidates
    candidate   an embedding that an anchor is compared with
    hard negative    similar, but of another meaning; false negative: of the same one after all
    weight      how much a candidate counts, or a term of the loss
    temperature what cosines are divided by: the lower, the more the closest candidates count
    (recipe)    after a setting: its value depends on the encoder, see `recipes`; else its source
    head        what stands between pooling and loss while training; projection head elsewhere
    teacher     another encoder, trained already and frozen
    step        one batch and one update of the weights
    round       the steps from one look at the corpus (`refresh`) to the next
    epoch       one pass over the corpus

Axes: B rows of a batch, V columns, C candidates, T tokens, D width, L layers, N rows of a corpus,
K neighbours, M slots of a memory.
"""

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import Corpus, Tokenizer, step_seed
from engine.encoders import load_masked_lm
from engine.flags import Row, flag
from engine.hub import encoder_folder
from engine.pieces import Pieces
from losses import alignment, cosine, uniformity
from model import EncoderConfig, Head, SentenceEncoder
from papers import settings
from papers.focal import LOSSES
from papers.views import POSITIVES

SOURCE = "Gao, Yao, Chen: SimCSE. EMNLP 2021, arXiv 2104.08821"


@dataclass(frozen=True)
class Config(settings.Config):
    mlm_weight: float = flag(0.0, "simcse", "λ of the masked-LM term (0.1 in SimCSE Table E.1)",
                             least=0)
    mlm_rate: float = flag(0.15, "simcse", "share of tokens masked for it", least=0, below=1)


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of one batch, in float32, the training head applied."""
    columns: list[Tensor]             # V x (B, D): anchor, positive, and hard negatives if any
    step: int                         # from 1 to `steps`
    steps: int                        # of the whole run
    rows: Tensor | None = None        # (B,) row numbers in the corpus
    ids: Tensor | None = None         # (V·B, T) what was encoded, column after column
    mask: Tensor | None = None        # (V·B, T)
    places: Tensor | None = None      # (R,) where the real tokens are among all V·B·T
    hidden: list[Tensor] | None = None   # `layers_read` x (V·B, T, D); the last may have T = 1
    bf16: bool = False                # the encoder's precision, and that of a method's networks
    pieces: Pieces = Pieces()         # the encoder's pieces, and those of a method's networks

    @property
    def anchor(self) -> Tensor:                                   # (B, D)
        return self.columns[0]

    @property
    def positive(self) -> Tensor:                                 # (B, D)
        return self.columns[1]


class SimCSE(nn.Module):
    """Two dropout views of a sentence; or the pairs and hard negatives of the corpus, if any.

    mincse.py calls prepare, refresh, views, loss and logs, in this order. Submodules are trained
    and saved, buffers are saved, and what `frozen` wraps is neither. `encode` maps N sentences to
    (N, D), without dropout, and without the head unless it is kept.
    """
    Config = Config
    rows = [
        Row("--method simcse", "two dropout masks make two views of one sentence", SOURCE,
            "BERT-base 76.25, -large 78.41; RoBERTa-base 76.57, -large 78.90"),
        Row("--method simcse --corpus nli", "entailed is positive, contradicted a hard negative",
            SOURCE, "BERT-base 81.57, -large 82.21; RoBERTa-base 82.52, -large 83.76"),
        Row("--mlm-weight 0.1", "keep predicting masked words, for the sake of transfer tasks",
            SOURCE, "none on STS: meant for transfer, costs 0.5 on STS-B dev (Table D.2)")]
    recipes = {                                                   # Table A.1; small is ours
        "bert-base": dict(batch_size=64, learning_rate=3e-5),
        "bert-large": dict(batch_size=64, learning_rate=1e-5),
        "roberta-base": dict(batch_size=512, learning_rate=1e-5),
        "roberta-large": dict(batch_size=512, learning_rate=3e-5),
        "small": dict(batch_size=64, learning_rate=1e-4, steps=150),  # measured here, on STS-B dev
        "base, supervised": dict(batch_size=512, learning_rate=5e-5, epochs=3),
        "large, supervised": dict(batch_size=512, learning_rate=1e-5, epochs=3),
        "small, supervised": dict(batch_size=128, learning_rate=3e-4, epochs=3, steps=0),
    }
    columns_taken = (1, 2, 3)         # of a corpus
    losses_taken = tuple(LOSSES)
    positives_taken = tuple(POSITIVES)
    hard_negatives = False            # does the paper make hard negatives itself?
    in_turn = False                   # are several corpora learned, one after the other?
    needs = {"mlm_rate": "mlm_weight"}   # a setting -> the one without which it has no effect
    toy = {}                          # settings for tests: fifty rows, two layers
    layers_read = 1                   # how many hidden layers `loss` gets, from the last one down
    head = Head                       # between pooling and loss while training
    turns = 0                         # of a loop around `train`, where a paper trains several times
    for_views = ()                    # buffers that only `views` reads
    search = None                     # what `prepare` does with all pairs of vectors of all rows
    all_rows = True                   # does `prepare` look at rows that training never comes to?

    @classmethod
    def check(cls, config: Config, corpora: list[Corpus], shape: EncoderConfig) -> None:
        """Refuse in a sentence what makes no sense for this paper, corpus and encoder."""

    def __init__(self, corpus: Corpus, config: Config, *, model: SentenceEncoder):
        """Set up what the loss needs, before the training head is drawn."""
        super().__init__()
        self.corpus, self.config, self.terms = corpus, config, {}
        self.view = bind(POSITIVES[config.positives], config)
        self.loss_of = bind(LOSSES[config.loss], config)
        self.mlm_weight = getattr(config, "mlm_weight", 0)        # other pages have no such term
        if self.mlm_weight:
            folder = encoder_folder(config.encoder)
            self.lm_head, self.tokenizer = load_masked_lm(folder, model), Tokenizer.read(folder)
            self.encode_tokens = model.encoder.forward            # a function is no submodule

    @classmethod
    def steps_of_run(cls, config: Config, corpora: list[Corpus]) -> int:
        return settings.count_steps(config, len(corpora[0]))

    def _apply(self, move: Callable, recurse: bool = True) -> nn.Module:
        """Keep `for_views` on the CPU: the thread of `views` must not wait for the GPU."""
        tables = {name: self._buffers.pop(name) for name in self.for_views}
        super()._apply(move, recurse)
        self._buffers.update(tables)
        return self

    def prepare(self, encode: Callable) -> None:
        """Look at the whole corpus with the present encoder, once before the first step."""

    def rounds(self, steps: int) -> list[tuple[int, Sequence[int]]]:
        """Pairs of steps and the rows that they train on: by default one round on all rows."""
        return [(steps, range(len(self.corpus)))]

    def refresh(self, encode: Callable, rows: Sequence[int]) -> None:
        """Look at the rows of a round with the present encoder, before each round but the first."""

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        """The texts of a batch, one list of B per column. A thread calls this ahead of the step."""
        columns = [[column[row] for row in rows] for column in self.corpus.columns]
        if len(columns) == 1:
            columns.append([self.view(text, rng) for text in columns[0]])
        return columns

    def contrast(self, out: Encoded) -> Tensor:                   # -> ()
        """InfoNCE, or the loss that --loss names, of the anchors among all other columns."""
        alpha, weight = self.config.hard_negative_weight, None
        if len(out.columns) == 3 and alpha != 1:
            weight = own_hard_negative(out.anchor, alpha)
        return self.loss_of(out.anchor, torch.cat(out.columns[1:]), weight=weight)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        """loss = contrast + λ · masked-LM loss, of a batch encoded with dropout and head."""
        contrast = self.contrast(out)
        if not self.mlm_weight:
            return contrast
        masked_lm = self.masked_lm_loss(out)
        self.terms = {"contrastive_loss": contrast.detach(), "masked_lm_loss": masked_lm.detach()}
        return contrast + self.mlm_weight * masked_lm

    def masked_lm_loss(self, out: Encoded) -> Tensor:             # -> ()
        """Cross-entropy of the masked tokens, in a second forward pass (SimCSE, section 2)."""
        masked, labels = self.tokenizer.mask(out.ids, rate=self.config.mlm_rate,    # (V·B, T)s
                                             seed=step_seed(self.config.seed, out.step))

        def surprise(ids: Tensor, mask: Tensor, labels: Tensor,
                     places: Tensor | None = None) -> list[Tensor]:                 # -> (V·B, T)
            asked = (labels.flatten() != -100).nonzero()[:, 0]    # (M,) of all V·B·T
            x = self.encode_tokens(ids, mask, places)[-1].flatten(0, 1)             # (V·B·T, D)
            words = self.lm_head(x.index_select(0, asked)).float()                  # (M, V)
            each = F.cross_entropy(words, labels.flatten()[asked], reduction="none")
            return [each.new_zeros(mask.numel()).index_copy(0, asked, each).view_as(mask)]

        with torch.autocast(out.ids.device.type, torch.bfloat16, enabled=out.bf16):
            [wrong] = out.pieces(surprise, masked, out.mask, labels,                # (V·B, T)
                                 places=out.places)
        return wrong.sum() / (labels != -100).sum().clamp(min=1)  # none masked: 0, not NaN

    def logs(self) -> dict[str, float]:
        """The terms of the last loss, for a line of metrics.jsonl."""
        return numbers(self.terms)


@torch.no_grad()
def measures(out: Encoded) -> dict[str, float]:
    """The geometry of a batch, as the loss saw it: with dropout and the training head."""
    if len(out.columns) == 1:                                     # labels instead of positives
        return numbers({"uniformity": uniformity(out.anchor)})
    similarity = cosine(out.anchor, out.positive)                 # (B, B)
    own = similarity.diagonal()
    others = (similarity.sum() - own.sum()) / (similarity.numel() - len(own))
    return numbers({"alignment": alignment(out.anchor, out.positive),
                    "uniformity": uniformity(out.anchor), "positive_cosine": own.mean(),
                    "lowest_positive_cosine": own.min(), "negative_cosine": others})


def numbers(found: dict[str, Tensor]) -> dict[str, float]:
    """The values on the host, in one transfer: each `.item()` would wait for the GPU."""
    return dict(zip(found, torch.stack([*found.values()]).tolist())) if found else {}


def bind(variant: Callable, config: Config) -> Callable:
    """A view or loss with those of its parameters fixed that the configuration names."""
    names = inspect.signature(variant).parameters
    return partial(variant, **{k: v for k, v in asdict(config).items() if k in names})


def own_hard_negative(anchor: Tensor, alpha: float) -> Tensor:    # (B, D) -> (B, 2B)
    """α at each anchor's own hard negative, 1 at all other candidates (SimCSE, eq. 8)."""
    own = torch.eye(len(anchor), dtype=anchor.dtype, device=anchor.device)          # (B, B)
    return torch.cat([torch.ones_like(own), 1 + (alpha - 1) * own], dim=1)


def frozen(network: nn.Module) -> Callable:
    """The network as a function, without dropout and gradient: neither trained nor saved."""
    network.eval().requires_grad_(False)

    @torch.no_grad()
    def ask(*inputs: Tensor):
        if next(network.parameters()).device != inputs[0].device:
            network.to(inputs[0].device)
        return network(*inputs)
    return ask

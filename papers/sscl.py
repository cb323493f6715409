"""
SSCL: what the last layer says of a sentence must differ from what the layers below it say.

Unlike SimCSE: the sentence vectors of the layers below the last one are negatives, too. This is
meant against over-smoothing: a sentence's vectors from deep layers are nearly equal to each other.
    loss    InfoNCE among the positives, and InfoNCE among them and M layers below, half each

Chen, Shou, Pei, Gong, Cao, Chang, Li, Jiang: ACL 2023, arXiv 2305.06154. As in the authors' code,
the negatives are lower layers of both views of every sentence, the anchor's own too; the paper uses
one view, and the second term only (w = 1). Their script sets --pooling mean. A step takes 1.02
times as long as SimCSE's with the built-in encoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.flags import Row, flag
from papers import settings
from papers.simcse import Encoded, SimCSE


@dataclass(frozen=True)
class Config(settings.Config):
    layers_as_negatives: int = flag(2, "sscl", "M, layers below the last one (their code)", least=0)
    layer_weight: float = flag(0.5, "sscl", "weight w of the loss with them; 1: eq. 4 (their code)",
                               least=0, most=1)


class SSCL(SimCSE):
    """loss = (1 - w) · L(anchor, positives) + w · L(anchor, positives and layers L-1 ... L-M)

    Nothing is detached, so the lower layers, too, learn to differ from the last.
    """
    Config = Config
    rows = [Row("--method sscl", "lower layers as negatives, against over-smoothing",
                "Chen, Shou, Pei, Gong, Cao, Chang, Li, Jiang: SSCL. ACL 2023, arXiv 2305.06154",
                "BERT-base 77.90, -large 79.69 (the means of its own rows: 77.75, 79.59)")]
    recipes = {"roberta-base": dict(batch_size=64),               # ours: the paper trains BERT only
               "roberta-large": dict(batch_size=64, learning_rate=1e-5)}
    columns_taken = (1, 2)
    needs = {"layer_weight": "layers_as_negatives"}
    toy = dict(layers_as_negatives=1)

    @classmethod
    def check(cls, config, corpora, shape) -> None:
        if config.layers_as_negatives >= shape.layers:
            raise ValueError(f"--layers-as-negatives: expected at most {shape.layers - 1}, those "
                             f"below the last of {config.encoder}, found "
                             f"{config.layers_as_negatives}")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        self.embed = model.embed      # pooling and training head; a function is no submodule
        self.layers_read = 1 + config.layers_as_negatives

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        plain, weight = self.contrast(out), self.config.layer_weight
        below = out.hidden[-2 : -2 - self.config.layers_as_negatives : -1] if weight else []
        if not below:                                             # SimCSE
            return plain
        below = [self.embed([x.to(out.anchor.dtype)], out.mask) for x in below]   # M x (V·B, D)
        layered = self.loss_of(out.anchor, torch.cat([out.positive, *below]))
        same = F.cosine_similarity(out.anchor, below[0][: len(out.anchor)]).mean()
        self.terms = {"instance_loss": plain.detach(), "layer_loss": layered.detach(),
                      "layer_cosine": same.detach()}              # near 1: the last layer is idle
        return (1 - weight) * plain + weight * layered


def token_similarity(x: Tensor, mask: Tensor) -> Tensor:          # (B, T, D), (B, T) -> (B,)
    """TokSim (eq. 1): the mean cosine of two different tokens of a sentence, in one layer."""
    m = mask.sum(dim=1)                                           # (B,), 2 or more
    whole = (F.normalize(x, dim=-1) * mask[:, :, None]).sum(dim=1)                  # (B, D)
    return (whole.square().sum(dim=-1) - m) / (m * (m - 1))


def layer_similarity(hidden: list[Tensor], mask: Tensor, pool: Callable) -> Tensor:
    """SetSim (eq. 2): mean cosines of neighbouring layers' sentence vectors. (B, T, D)s -> (L,)"""
    vectors = [pool([x], mask) for x in hidden]                   # (B, D)s
    return torch.stack([F.cosine_similarity(a, b).mean() for a, b in pairwise(vectors)])

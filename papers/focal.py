"""
Focal-InfoNCE: a negative that is close already pushes harder than one that is far.

Unlike SimCSE: every cosine is scaled by itself before the temperature divides it.
    --loss focal    s·s in place of s for the positive, s·(s + m) for a negative

Hou, Li: Findings of EMNLP 2023, arXiv 2310.06918. The formula, m = 0.3 and the gradient through
both factors (none is a constant) are those of the authors' code, which leaves hard negatives out of
the loss; here a corpus with a third column is refused. A step costs what SimCSE's costs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.flags import Row, flag
from losses import cosine, info_nce, pick_own


@dataclass(frozen=True)
class Config:
    hardness: float = flag(0.3, "--loss focal", "m, added to the cosine of a negative (their code)")


class Focal:
    """The row of --list and what is refused: the loss itself is a function."""
    rows = [Row("--loss focal", "negatives that are close already push harder",
                "Hou, Li: Focal-InfoNCE. Findings of EMNLP 2023, arXiv 2310.06918",
                "BERT-base 77.32, -large 78.72; RoBERTa-base 77.58, -large 78.74")]

    @classmethod
    def check(cls, config, corpora, shape) -> None:
        if len(corpora[0].columns) == 3:
            raise ValueError(f"--loss focal is for sentences and pairs, but {config.corpus} has "
                             "hard negatives (3 columns): use --loss info-nce")


def focal_info_nce(anchor: Tensor, candidates: Tensor, *, temperature: float = 0.05,
                   weight: Tensor | None = None, hardness: float = 0.3) -> Tensor:
    """InfoNCE that pushes most on the negatives that are closest already.

        loss = mean_i  -log  exp(l_ii / τ) / Σ_j w_ij exp(l_ij / τ)
        l_ii = s_ii · s_ii,   l_ij = s_ij · (s_ij + m),   s_ij = cos(a_i, c_j)

    A negative counts more than in InfoNCE where s > 1 - m or s < 0, and is pushed to -m/2, not to
    -1. A positive below 0 is pushed away. m = 0: InfoNCE on squared cosines.
    """
    s = cosine(anchor, candidates)                                # (B, C)
    own = torch.eye(*s.shape, dtype=torch.bool, device=s.device)  # (B, C), True at (i, i)
    return pick_own(torch.where(own, s * s, s * (s + hardness)) / temperature, weight)


LOSSES = {"info-nce": info_nce, "focal": focal_info_nce}

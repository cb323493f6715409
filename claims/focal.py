"""
Focal-InfoNCE: more of the gradient goes to hard negatives, those that are close already.

Source: Hou, Li. Findings of EMNLP 2023, arXiv 2310.06918, abstract.
Planted: a batch of 32 sentences of a small grammar, each with one that says the contrary in the
same words: for every anchor one hard negative among 63. The batch is that of the fifth step of
SimCSE; measured are shares of the gradient in the cosines of an anchor's negatives.
"""

import torch
from torch import Tensor

from claims import Rows, Shows, Trial, show, steps
from claims.planted import meanings, opposite, say
from losses import cosine
from papers.focal import LOSSES

SHOWS = [Shows("on the contrary", "focal", "info-nce"),
         Shows("on the closest tenth", "focal", "info-nce")]


def measure(trial: Trial) -> Rows:
    texts = [say(each, 7) for meaning in meanings(32, trial.rng)
             for each in (meaning, opposite(meaning))]
    *_, (_, _, out) = steps(trial.job("simcse", texts, steps=5, batch_size=64))
    place = {row: i for i, row in enumerate(out.rows.tolist())}
    contrary = torch.tensor([[place[row ^ 1]] for row in place])                    # (B, 1)
    similarity = cosine(out.anchor, out.positive).detach().fill_diagonal_(-1)       # (B, B)
    nearest, rows = similarity.topk(6).indices, {}                                  # (B, 6)
    for name, loss in LOSSES.items():
        share = shares(loss, out.anchor.detach(), out.positive.detach())            # (B, B)
        rows[name] = {"on the contrary": share.gather(1, contrary).mean().item(),
                      "on the closest tenth": share.gather(1, nearest).sum(1).mean().item()}
    return rows | {"perfect": {"on the contrary": 1, "on the closest tenth": 1}}


def shares(loss, anchor: Tensor, positive: Tensor) -> Tensor:     # (B, D), (B, D) -> (B, B)
    """The gradient in the cosine of each negative, as a share of an anchor's sum over them."""
    found = []
    for i in range(len(anchor)):
        candidates = positive.roll(-i, dims=0).requires_grad_()   # the anchor's own comes first
        loss(anchor[i : i + 1], candidates).backward()
        # Turning c by an angle changes the cosine by the sine, and moves c by its length.
        sine = (1 - cosine(anchor[i : i + 1], positive)[0].square()).sqrt()         # (B,)
        push = (candidates.grad.norm(dim=1) * candidates.norm(dim=1)).roll(i, dims=0) / sine
        push[i] = 0
        found.append(push.detach() / push.sum())
    return torch.stack(found)


if __name__ == "__main__":
    show(__name__)

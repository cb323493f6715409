"""
Focal-InfoNCE: more of the gradient goes to hard negatives, those that are close already.

Source: Hou, Li. Findings of EMNLP 2023, arXiv 2310.06918, abstract.
Planted: a batch of 32 sentences of a small grammar, each with one that says the contrary in the
same words: for every anchor one hard negative among 63. The batch is that of the fifth step of
SimCSE; measured are shares of the gradient in the cosines of an anchor's negatives.
"""

import torch
from torch import Tensor

from claims import Curves, Rows, Shows, Trial, show, steps
from claims.planted import meanings, opposite, say
from losses import cosine
from papers.focal import LOSSES

SHOWS = [Shows("on the contrary", "focal", "info-nce"),
         Shows("on the closest tenth", "focal", "info-nce")]


def measure(trial: Trial) -> Rows:
    contrary, similarity, found = weighed(trial)
    nearest = similarity.topk(6).indices                          # (B, 6)
    return {name: {"on the contrary": share.gather(1, contrary).mean().item(),
                   "on the closest tenth": share.gather(1, nearest).sum(1).mean().item()}
            for name, share in found.items()
            } | {"perfect": {"on the contrary": 1, "on the closest tenth": 1}}


def curves(trial: Trial) -> Curves:
    """The mean share of a negative by its cosine."""
    _, similarity, found = weighed(trial)
    bins = (20 * similarity).floor() / 20
    return Curves("cosine of anchor and negative", "share of the gradient, %", {
        name: [(level + 0.025, 100 * share[bins == level].mean().item())
               for level in bins.unique().tolist() if level > -1] for name, share in found.items()})


def weighed(trial: Trial) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Places of the contraries (B, 1), cosines (B, B), and the shares (B, B) by loss."""
    texts = [say(each, 7) for meaning in meanings(32, trial.rng)
             for each in (meaning, opposite(meaning))]
    *_, (_, _, out) = steps(trial.job("simcse", texts, steps=5, batch_size=64))
    place = {row: i for i, row in enumerate(out.rows.tolist())}
    contrary = torch.tensor([[place[row ^ 1]] for row in place])                    # (B, 1)
    anchor, positive = out.anchor.detach(), out.positive.detach()                   # (B, D)s
    return contrary, cosine(anchor, positive).fill_diagonal_(-1), {
        name: shares(loss, anchor, positive) for name, loss in LOSSES.items()}


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

"""
DiffCSE: a sentence's vector helps a second network to see which of its words were replaced.

Source: Chuang, Dangovski, Luo et al. NAACL 2022, arXiv 2204.10298, section 3.
Planted: nothing. The detection loss on the last ten batches, each before the step that learns from
it, when the network is given the vector of the sentence itself, of another one, or zeros.

Tried: 100 steps with weight λ = 1 in place of 0.005. The network finds a quarter of the replaced
words instead of a sixth, and still as many without the vector: it learns to read the words first.
"""

from statistics import fmean

import torch

from claims import Rows, Shows, Trial, show, steps
from papers.diffcse import detection_loss, hits

SHOWS = [Shows("loss", "another's vector", "own vector"), Shows("loss", "no vector", "own vector")]


def measure(trial: Trial) -> Rows:
    job = trial.job("diffcse", trial.sentences(trial.scaled(900)), steps=trial.scaled(40),
                    batch_size=16, max_tokens=16, learning_rate=3e-4)
    found = {"own vector": [], "another's vector": [], "no vector": []}
    for step, _, out in steps(job):
        if step > job.steps - 10:
            own = torch.cat(out.columns).detach()                 # (2B, D)
            edited = job.method.edit(out.ids, out.mask, out.step)                   # (2B, T)
            for each, vectors in zip(found.values(), (own, own.roll(1, dims=0), 0 * own)):
                each.append(detection(job.method, out, edited, vectors))
    return {name: {column: fmean(each[column] for each in batches) for column in batches[0]}
            for name, batches in found.items()
            } | {"perfect": {"loss": 0, "found": 1, "left_alone": 1}}


@torch.no_grad()
def detection(method, out, edited: torch.Tensor, vectors: torch.Tensor) -> dict[str, float]:
    logits, replaced = (x[out.mask] for x in (
        method.detect(edited, out.mask, vectors), edited != out.ids))               # (R, 2), (R,)
    shares = hits(logits, replaced)
    return {"loss": detection_loss(logits, replaced).item(),
            **{name: shares[name].item() for name in ("found", "left_alone")}}


if __name__ == "__main__":
    show(__name__)

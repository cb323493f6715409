"""
IS-CSE: a positive blended with its neighbours lies nearer to the centre of its meaning.

Source: He, Zhang, Lan, Zhang. AAAI 2023, arXiv 2305.07424, abstract.
Planted: 64 sentences of the built-in corpus in eight copies each, words swapped and dropped, fill
the memory. The centre of a meaning is the mean of eight other copies. The lead is how much nearer
it is than any other centre, of the positives of the last batch.
Tried as well: a raw [CLS], which tells meanings apart badly. Half of the neighbours are then of
other meanings, and the blend comes nearer to other centres by more than to its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from claims import Rows, Shows, Trial, show, steps
from claims.planted import copies
from losses import cosine
from papers.is_cse import smooth

SHOWS = [Shows("to its centre", "smoothed", "positive"), Shows("lead", "smoothed", "positive")]


def measure(trial: Trial) -> Rows:
    rng, count = trial.rng, trial.scaled(64)
    known, others = ([copy for text in trial.sentences(count)
                      for copy in copies(text, 8, rng, rate=0.3)] for _ in range(2))
    # Mean pooling has no head, so that what is blended and what `encode` gives are in one space.
    job = trial.job("is-cse", known, buffer_size=len(known), neighbours=7, pooling="mean",
                    steps=trial.scaled(16), max_tokens=16, learning_rate=3e-4)
    *_, (_, _, out) = steps(job)
    own = F.one_hot(out.rows // 8, count).bool()                  # (B, G)

    def means(texts: list[str]) -> Tensor:                        # -> (G, D)
        return job.encode(texts, max_tokens=16).unflatten(0, (count, 8)).mean(dim=1)

    centres = means(others)

    def row(x: Tensor) -> dict[str, float]:
        to = cosine(x, centres)                                   # (B, G)
        found, next_ = to[own].mean().item(), to.masked_fill(own, -1).amax(dim=1).mean().item()
        return {"to its centre": found, "to the next": next_, "lead": found - next_}

    positive = out.positive.detach()
    smoothed = smooth(positive, job.method.memory.rows, neighbours=job.config.neighbours,
                      temperature=job.config.smoothing_temperature)
    return {"positive": row(positive), "smoothed": row(smoothed),
            "perfect": row(means(known)[out.rows // 8])}


if __name__ == "__main__":
    show(__name__)

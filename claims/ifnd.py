"""
IFND: false negatives are found by clustering, the surest first, and more of them in each round.

Source: Chen, Hung, Tseng, Chien, Yang. ICLR 2022, arXiv 2106.03719, abstract.
Planted: 100 sentences of the built-in corpus, each with five copies, words swapped and dropped. Of
the pairs that share an accepted label: are they copies of one sentence, and are all copies found?
Few labels are accepted in round 1, so that its precision differs much from seed to seed.
"""

import torch

from claims import Rows, Shows, Trial, show, steps
from claims.planted import copies, pair_scores

SHOWS = [Shows("recall", "round 4", "round 1"), Shows("precision", "round 1", "round 4")]


def measure(trial: Trial) -> Rows:
    count, rng = trial.scaled(100), trial.rng
    texts = [copy for text in trial.sentences(count) for copy in [text, *copies(text, 5, rng)]]
    group = torch.arange(count).repeat_interleave(6)
    job, rows = trial.job("ifnd", texts, clusters=count, steps=max(5, trial.scaled(25)),
                          max_tokens=16, learning_rate=1e-4), {}
    for _ in steps(job):
        round_ = job.method.refreshed.item()
        name = f"round {round_}" if round_ else "round 0, SimCSE"
        rows[name] = pair_scores(job.method.label[0], group)
    return rows | {"perfect": {"precision": 1, "recall": 1}}


if __name__ == "__main__":
    show(__name__)

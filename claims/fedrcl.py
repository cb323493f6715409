"""
FedRCL: contrast keeps clients together and collapses their classes; relaxed, it collapses less.

Source: Seo, Kim, Kim, Han. CVPR 2024, arXiv 2401.04928, sections 3 and 4.
Planted: clients with unequal shares of eight topics, which are clusters of the built-in corpus.
After two rounds, on sentences held out: 100 x drift, and 100 x cosines.

Why not all: two rounds of so few steps hardly move an encoder, and luck stays. In five rounds, with
one seed (docs/RESULTS.md), contrast halved the drift and raised the same-class cosine by 0.07.
"""

from functools import partial

from claims import Rows, Shows, Trial, show
from engine.flags import Stop
from mincse import train_on

SHOWS = [Shows("drift", "cross-entropy", "+ contrast"),
         Shows("same class", "+ contrast", "cross-entropy"),
         Shows("same class", "+ contrast", "+ contrast and penalty")]
WEIGHTS = {"cross-entropy": (0.0, 0.0), "+ contrast": (1.0, 0.0),
           "+ contrast and penalty": (1.0, 1.0)}


def measure(trial: Trial) -> Rows:
    texts, rows = trial.sentences(max(800, trial.scaled(1000))), {}
    for name, (attraction, penalty) in WEIGHTS.items():
        job = trial.job("fedrcl", texts, clients=4, rounds=2, classes=8, batch_size=32,
                        steps=max(4, trial.scaled(5)), max_tokens=16, learning_rate=1e-4,
                        scl_weight=attraction, penalty_weight=penalty)
        *_, last = job.method.outer_loop(job, partial(train_on, job, Stop()), first=1)
        rows[name] = {"drift": 100 * last["drift"], "same class": 100 * last["same_class_cosine"],
                      "other classes": 100 * last["between_class_cosine"],
                      "participation ratio": last["participation_ratio"]}
    return rows


if __name__ == "__main__":
    show(__name__)

"""
Twins: a changed text is drawn near, but keeps the distance that its change of meaning deserves.

Source: Xiao, Li, Chen. arXiv 2307.10932, abstract.
Planted: changes of graded strength, by four rules for sentences of the built-in corpus, measured by
a teacher (the encoder itself after some steps of SimCSE). Of the gaps after training, dropout off:
rank correlation with the innate margins, and 100 x the mean distance from them.

Why not: beside a contrastive loss of 0.08 the twins loss is 0.009, and moves an encoder little
whose gaps already follow a teacher that was trained from the same start. Tried, with one or two
seeds: a teacher trained five times as long, with the same outcome; λ = 100 in place of 1, which
halves the loss, that of vectors behind the head and with dropout, and takes the encoder's own gaps
farther off.
"""

import tempfile

import torch
import torch.nn.functional as F

from claims import Rows, Shows, Trial, show
from engine.encoders import save
from eval_sts import spearman

SHOWS = [Shows("distance", "without the twins loss", "with it"),
         Shows("correlation", "with it", "without the twins loss")]


def measure(trial: Trial) -> Rows:
    texts, rows = trial.sentences(trial.scaled(320)), {}
    settings = dict(steps=trial.scaled(11), batch_size=32, max_tokens=16, learning_rate=3e-4)
    teacher = trial.trained("simcse", texts, **settings)
    with tempfile.TemporaryDirectory() as folder:
        save(teacher.model, folder)
        for name, weight in (("without the twins loss", 0.0), ("with it", 1.0)):
            job = trial.trained("twins", texts, teacher=folder, twins_weight=weight,
                                queue_batches=0, **settings)
            rows[name] = kept(job, texts)
    return rows | {"perfect": {"correlation": 1, "distance": 0}}


def kept(job, texts: list[str]) -> dict[str, float]:
    changed = [job.method.fraternal(row) for row in range(len(texts))]
    gaps = 1 - F.cosine_similarity(*job.encode(texts + changed, max_tokens=16).chunk(2))    # (N,)
    margins, seen = job.method.margins.cpu(), torch.tensor([a != b for a, b in zip(texts, changed)])
    seen &= margins > 0                                           # rows that the run has taken
    return {"correlation": spearman(gaps[seen].tolist(), margins[seen].tolist()) / 100,
            "distance": 100 * (gaps - margins)[seen].abs().mean().item()}


if __name__ == "__main__":
    show(__name__)

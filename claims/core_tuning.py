"""
Core-tuning: mixed pairs are harder than given ones: positives less similar, negatives more.

Source: Zhang, Hooi, Hu, Liang, Feng. NeurIPS 2021, arXiv 2102.06605, section 4.
Planted: pairs of premises with two entailed wordings each, and a contradiction that differs by
its verb. After a few steps: the contrastive loss of a batch with its mixed pairs and without, and
the cosines of premises to given pairs (entailed, stranger) and to mixed ones.

Why not the positives: half of a mixed one is the most similar negative. To an encoder that does not
tell a contradiction yet, that is nearer to the premise than what the premise entails.
"""

import numpy as np
import torch

from claims import Rows, Shows, Trial, show, steps
from claims.planted import meanings, opposite, say
from losses import cosine
from papers.core_tuning import harder

SHOWS = [Shows("loss", "with mixed", "given"), Shows("positive cosine", "given", "with mixed"),
         Shows("negative cosine", "with mixed", "given")]


def measure(trial: Trial) -> Rows:
    rng = trial.rng
    premises = [meaning for meaning in meanings(trial.scaled(200), rng) for _ in (1, 2)]
    wordings = [rng.randrange(1, 31) for _ in premises]
    job = trial.job("core-tuning", [say(meaning, 0) for meaning in premises],
                    [say(meaning, wording) for meaning, wording in zip(premises, wordings)],
                    [say(opposite(meaning), wording) for meaning, wording
                     in zip(premises, wordings)],
                    steps=trial.scaled(20), batch_size=32, max_tokens=16, learning_rate=1e-4)
    *_, (_, _, out) = steps(job)
    return hardness(job.method, [column.detach() for column in out.columns],
                    job.method.group[out.rows], trial.seed)


@torch.no_grad()
def hardness(method, columns: list[torch.Tensor], group: torch.Tensor, seed: int) -> Rows:
    """Of the last batch: what was given, and what was mixed of it."""
    anchor, given, same = columns[0], list(zip(columns[1:], torch.eye(3))), group[:, None] == group
    strangers, mixed = harder(anchor, given, same, alpha=1.0, rng=np.random.default_rng(seed))
    rows = {"given": ([], [given[0], strangers[0]]), "with mixed": (mixed, mixed)}
    return {name: {"loss": method.supervised_contrast(anchor, given, added, same).item(),
                   "positive cosine": cosine(anchor, positive[0]).diagonal().mean().item(),
                   "negative cosine": cosine(anchor, negative[0]).diagonal().mean().item()}
            for name, (added, (positive, negative)) in rows.items()}


if __name__ == "__main__":
    show(__name__)

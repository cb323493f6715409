"""
KDMCSE: pairs that the teacher finds alike are not pushed apart, and the others are pushed further.

Source: Nguyen, Nguyen, Wu, Luu. NAACL 2024, arXiv 2403.17486, abstract and figure 4.
Planted: 64 meanings of a small grammar, each in two wordings, and a teacher that knows which belong
together, but not well: a random vector for each meaning, and noise almost as strong. Cosines of
near pairs, of one meaning, and of far ones; shares dropped (11 to 20 % by the default threshold).
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from claims import Rows, Shows, Trial, show
from claims.planted import meanings, say
from losses import cosine

SHOWS = [Shows("near", "kdmcse", "simcse"), Shows("far", "simcse", "kdmcse")]


def measure(trial: Trial) -> Rows:
    rng, drawn = trial.rng, torch.Generator().manual_seed(trial.seed)
    texts = [say(meaning, wording) for meaning in meanings(64, rng)
             for wording in rng.sample(range(32), 2)]
    same = torch.arange(128)[:, None] // 2 == torch.arange(128) // 2                # (N, N)
    near, far = same.triu(1), (~same).triu(1)
    taught = torch.randn(64, 64, generator=drawn).repeat_interleave(2, dim=0)       # (N, 64)
    taught += 0.8 * torch.randn(taught.shape, generator=drawn)

    def row(encode) -> dict[str, float]:
        similarity = cosine(*[encode(texts)] * 2)
        return {"near": similarity[near].mean().item(), "far": similarity[far].mean().item()}

    settings = dict(steps=trial.scaled(15), batch_size=64, pooling="mean", learning_rate=3e-4)
    job = trial.job("simcse", texts, **settings)
    rows = {"as it was": row(job.encode),
            "simcse": row(trial.trained("simcse", texts, **settings).encode)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "teacher.npy")
        np.save(path, taught.numpy())
        job = trial.trained("kdmcse", texts, teacher=str(path), teacher_threshold=0.5, **settings)
    dropped = cosine(*[job.method.teacher.float()] * 2) > job.method.threshold
    rows["kdmcse"] = row(job.encode) | {"near, dropped": dropped[near].float().mean().item(),
                                        "far, dropped": dropped[far].float().mean().item()}
    return rows | {"perfect": {"near": 1, "near, dropped": 1, "far, dropped": 0}}


if __name__ == "__main__":
    show(__name__)

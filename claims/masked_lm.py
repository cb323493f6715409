"""
SimCSE with masked LM: a masked-LM term keeps what the encoder knows of single words.

Source: Gao, Yao, Chen. EMNLP 2021, arXiv 2104.08821, section 5, tables D.2 and E.1.
Planted: nothing. The loss on masked words, 15 % of them, in sentences of the built-in corpus that
are not trained on; a perfect encoder would not forget.
"""

from dataclasses import replace

import torch

from claims import Rows, Shows, Trial, show
from mincse import Job
from papers.simcse import Encoded, SimCSE

SHOWS = [Shows("masked-LM loss", "weight 0", "weight 0.1")]


def measure(trial: Trial) -> Rows:
    held_out, texts = trial.sentences(1000)[:100], trial.sentences(1000)[100:]
    settings = dict(steps=trial.scaled(20), batch_size=32, max_tokens=16, learning_rate=3e-4)
    rows = {"as it was": {"masked-LM loss": surprise(trial.job("simcse", texts, **settings),
                                                     held_out)}}
    for weight in (0, 0.1):
        job = trial.trained("simcse", texts, mlm_weight=weight, **settings)
        rows[f"weight {weight:g}"] = {"masked-LM loss": surprise(job, held_out)}
    return rows


@torch.no_grad()
def surprise(job: Job, texts: list[str]) -> float:
    """The masked-LM loss of a job's model, without dropout, on the same words for each model."""
    method = job.method
    if not method.mlm_weight:                                     # the head as it was pre-trained
        method = SimCSE(job.inputs.corpus, replace(job.config, mlm_weight=0.1), model=job.model)
    job.model.eval()
    ids, mask = job.inputs.tokenizer(texts, max_tokens=32)        # (B, T)s
    return method.masked_lm_loss(Encoded([], step=0, steps=0, ids=ids, mask=mask)).item()


if __name__ == "__main__":
    show(__name__)

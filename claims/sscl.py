"""
SSCL: with lower layers as negatives, tokens and layers stay apart, which blur under SimCSE.

Source: Chen, Shou, Pei, Gong, Cao, Chang, Li, Jiang. ACL 2023, arXiv 2305.06154, section 3.
Planted: nothing. Mean cosines of two tokens of a sentence, and of a sentence in the last two
layers, on 96 other sentences of the built-in corpus: 1 is a blur.

Why not the tokens: the loss compares one vector a layer of each sentence, and no two tokens. They
draw nearer with both losses.
"""

import torch

from claims import Rows, Shows, Trial, show
from mincse import Job
from model import POOLINGS
from papers.sscl import layer_similarity, token_similarity

SHOWS = [Shows("layers", "SimCSE (w = 0)", "SSCL (w = 0.5)"),
         Shows("tokens", "SimCSE (w = 0)", "SSCL (w = 0.5)")]


def measure(trial: Trial) -> Rows:
    texts = trial.sentences(trial.scaled(640) + 96)
    settings = dict(steps=trial.scaled(20), batch_size=32, max_tokens=16, learning_rate=3e-4)
    return {"before": blurred(trial.job("sscl", texts[96:], **settings), texts[:96]),
            **{name: blurred(trial.trained("sscl", texts[96:], layer_weight=weight, **settings),
                             texts[:96])
               for name, weight in (("SimCSE (w = 0)", 0.0), ("SSCL (w = 0.5)", 0.5))}}


@torch.no_grad()
def blurred(job: Job, texts: list[str]) -> dict[str, float]:
    ids, mask = job.inputs.tokenizer(texts, max_tokens=16)
    hidden = job.model.eval().encoder(ids, mask)                  # L + 1 x (B, T, D)
    layers = layer_similarity(hidden, mask, POOLINGS[job.config.pooling])
    return {"layers": layers[-1].item(),
            "tokens": token_similarity(hidden[-1], mask).mean().item()}


if __name__ == "__main__":
    show(__name__)

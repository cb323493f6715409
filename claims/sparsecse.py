"""
SparseCSE: heads and neurons that harm alignment and uniformity are found, and removed.

Source: An, Zhang, Song. arXiv 2311.03881, abstract.
Planted: noise in the weights of every tenth neuron. A tenth of all goes, by each criterion: which
share of it is noisy, and how are the doc twins found afterwards (100 x MRR)?

The sign finds them: a noisy neuron is one without which both measures fall. By absolute slopes, the
criterion of the paper as we understand it, it matters much, and so it stays.
"""

from functools import partial

import torch

from claims import Rows, Shows, Trial, show
from engine.docs import doc_twins
from engine.hub import encoder_folder
from eval_sts import TwinTest, open_encoder
from model import encode
from papers import sparsecse
from papers.sparsecse import CRITERIA, masks, matrices, remove

SHOWS = [Shows("noisy", "contribution", "random"), Shows("noisy", "signed", "random"),
         Shows("doc twins", "contribution", "random")]


def measure(trial: Trial) -> Rows:
    model, tokenizer = open_encoder(encoder_folder(trial.encoder))
    noisy = spoil(model, trial.seed)                                                # (L, F)
    slopes = sparsecse.measure(model, tokenizer, trial.sentences(trial.scaled(192)),
                               batch_size=32, max_tokens=16)
    test = TwinTest(doc_twins()[::2])
    rows, kept = {}, {name: masks(rank(slopes), 10)["neurons"] for name, rank in CRITERIA.items()}
    for name, gates in ({"nothing removed": torch.ones(noisy.shape)} | kept
                        | {"perfect": (~noisy).float()}).items():
        gone, left = gates == 0, remove(model, {"neurons": gates})
        rows[name] = {"doc twins": test.score(partial(encode, left, tokenizer)).scores["mrr"]}
        if gone.any():
            rows[name]["noisy"] = noisy[gone].float().mean().item()
    return rows


@torch.no_grad()
def spoil(model, seed: int) -> torch.Tensor:                      # -> (L, F)
    """Add noise, three times as large as the weights, to what makes a tenth of the neurons."""
    drawn = torch.Generator().manual_seed(seed)
    layers = matrices(model.encoder, "neurons")
    noisy = torch.rand(len(layers), layers[0][0].in_features, generator=drawn) < 0.1
    for (_, maker), its_own in zip(layers, noisy):
        noise = torch.randn(maker.weight.shape, generator=drawn) * 3 * maker.weight.std()
        maker.weight[its_own] += noise[its_own]
    return noisy


if __name__ == "__main__":
    show(__name__)

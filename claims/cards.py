"""
CARDS: retrieved sentences are harder negatives than those of the batch; an equal text is none.

Source: Wang, Ge, Zhang, Yang. SIGIR 2022, arXiv 2206.02457, section 3.
Planted: a corpus of only 300 sentences, so that what one retrieves is now and then another of its
batch. Before training: cosines to the anchors, and the
probabilities of the candidates in percent, with which the gradient weighs each negative.
"""

import torch

from claims import Rows, Shows, Trial, show, steps
from losses import cosine
from papers.cards import candidate_weight

SHOWS = [Shows("cosine", "own retrieved", "others of the batch"),
         Shows("push of one", "own retrieved", "others of the batch"),
         Shows("push of all", "equal texts, counted", "equal texts, as in CARDS")]


def measure(trial: Trial) -> Rows:
    job = trial.job("cards", trial.sentences(300), steps=1, batch_size=64, retrieved=1,
                    retrieve_from=4, head="none")
    *_, (_, _, out) = steps(job)
    return pushes(out, job.config.temperature)


@torch.no_grad()
def pushes(out, temperature: float) -> Rows:
    """What each kind of negative is, and how hard it pushes, alone and with its like."""
    batch = len(out.anchor)
    weight = candidate_weight(out.ids[:batch], out.ids[2 * batch :])                # (B, 2B)
    similarity = cosine(out.anchor, torch.cat(out.columns[1:]))                     # (B, 2B)
    own, equal = torch.eye(batch, dtype=torch.bool), weight == 0
    none = torch.zeros_like(own)
    groups = {"others of the batch": torch.cat([~own, none], dim=1),
              "own retrieved": torch.cat([none, own], dim=1) & ~equal}
    shares = (similarity / temperature + weight.log()).softmax(dim=1)
    counted = (similarity / temperature).softmax(dim=1)
    rows = {name: {"cosine": similarity[members].mean().item(),
                   "push of one": 100 * shares[members].mean().item(),
                   "push of all": 100 * shares[members].sum().item() / batch}
            for name, members in groups.items()}
    for name, each in (("equal texts, counted", counted), ("equal texts, as in CARDS", shares)):
        rows[name] = {"push of all": 100 * each[equal].sum().item() / batch}
    return rows


if __name__ == "__main__":
    show(__name__)

"""
SimCSE, supervised: a contradiction is a harder negative than a stranger, and teaches more.

Source: Gao, Yao, Chen. EMNLP 2021, arXiv 2104.08821, section 4, tables 4 and 7.
Planted: triples of a small grammar: a sentence, the same meaning in another wording, and the same
with a verb that says the contrary, again worded otherwise. Measured are triples of other meanings.
Tried as well: contradictions in the words of the sentence itself, [CLS], 40 steps: nothing shows.
"""

import torch.nn.functional as F

from claims import Rows, Shows, Trial, show
from claims.planted import meanings, opposite, say

SHOWS = [Shows("to contradiction", "pairs", "triples"),
         Shows("entailment first", "triples", "pairs")]


def measure(trial: Trial) -> Rows:
    rng = trial.rng
    triples = [[say(each, rng.randrange(32)) for each in (meaning, meaning, opposite(meaning))]
               for meaning in meanings(1000, rng)]
    held_out, columns = [*zip(*triples[:200])], [*zip(*triples[200:])]

    def row(encode) -> dict[str, float]:
        premise, *others = map(encode, held_out)
        entailed, contrary, stranger = (F.cosine_similarity(premise, other)
                                        for other in (*others, premise.roll(1, dims=0)))
        return {"to entailment": entailed.mean().item(), "to contradiction": contrary.mean().item(),
                "to a stranger": stranger.mean().item(),
                "entailment first": (entailed > contrary).float().mean().item()}

    settings = dict(batch_size=32, pooling="mean", steps=trial.scaled(25), learning_rate=1e-3)
    rows = {"as it was": row(trial.job("simcse", *columns, **settings).encode)}
    for name, count in (("pairs", 2), ("triples", 3)):
        rows[name] = row(trial.trained("simcse", *columns[:count], **settings).encode)
    return rows | {"perfect": {"to entailment": 1, "entailment first": 1}}


if __name__ == "__main__":
    show(__name__)

"""
InfoCSE: annotation and representation improve each other, so a frozen annotator finds less.

Source: Yang, Liu, Xiao, Lian, Wu, Lian, Sun, Xie. arXiv 2202.13802, abstract.
Planted: documents of six doc twins each, descriptions of one function by different people. Which
sentences are joined to clusters, by encoders trained as long on these documents: pairs, and the
adjusted Rand index with the truth.

Why not: training raises precision and lowers recall, in all three alike. Cosines across documents
vary more than before, and the annotator's threshold, their mean + 3 deviations, rises with them.
Tried: documents of a small grammar, four meanings in three wordings, with the same outcome.
"""

import random
from functools import partial
from itertools import chain

import torch

from claims import Rows, Shows, Trial, show
from claims.planted import pair_scores
from engine.docs import doc_twins
from eval_sts import Encode
from papers.infocse import adjusted_rand, annotate

SHOWS = [Shows("agreement", "InfoCSE", "SimCSE"), Shows("agreement", "InfoCSE", "frozen annotator")]
SIZE = 12                             # sentences of a document


def measure(trial: Trial) -> Rows:
    texts, group = [], []
    twins = trial.rng.sample(doc_twins(), 216)
    for first in range(0, len(twins), SIZE // 2):
        document = [(text, number) for number, (_, *both) in enumerate(
            twins[first : first + SIZE // 2], start=first) for text in both]
        random.Random(first).shuffle(document)
        texts += [text for text, _ in document]
        group += [number for _, number in document]
    settings = dict(steps=trial.scaled(12), batch_size=32, learning_rate=1e-4, max_tokens=32,
                    documents=[row // SIZE for row in range(len(texts))])
    encoders = {"before": trial.encode, "SimCSE": trial.trained("simcse", texts, **settings).encode}
    for name, annotator in (("frozen annotator", "frozen"), ("InfoCSE", "current")):
        encoders[name] = trial.trained("infocse", texts, annotator=annotator,
                                       annotation_quantile=0.9, **settings).encode
    return {name: found_by(encode, texts, torch.tensor(group)) for name, encode in encoders.items()
            } | {"perfect": {"precision": 1, "recall": 1, "agreement": 1}}


def found_by(encode: Encode, texts: list[str], group: torch.Tensor) -> dict[str, float]:
    """What the annotator of the paper's page finds with this encoder."""
    rows = [range(first, first + SIZE) for first in range(0, len(texts), SIZE)]
    found = annotate(texts, rows, partial(encode, max_tokens=32), quantile=0.9)
    cluster = torch.tensor([found.cluster[row] for row in range(len(texts))])       # (N,)
    return pair_scores(cluster, group) | {"agreement": adjusted_rand(cluster, group)}


if __name__ == "__main__":
    show(__name__)

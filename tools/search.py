"""
Which sentences of a corpus are most like this one?

    python -m tools.search runs/mine corpus.txt "a query" "another one"
    python -m tools.search runs/mine corpus.txt --queries queries.txt --top 3
    python -m tools.search runs/mine --similarity "A man plays." "Someone makes music."

Prints cosine, line and text of each sentence found; the search is exact. The vectors of the corpus
stay beside it, in corpus.txt.vectors.npz, for the next search with the same corpus and encoder.
"""

if __name__ == "__main__":
    import engine.interrupt           # noqa: F401  first: Ctrl-C while torch is imported

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.flags import Parser, complain, count, exits, program
from engine.hub import file_sha256
from engine.run_folder import encoder_sha256
from eval_sts import Encode
from tools.encode import encode_all, open_encode, read_texts, write_vectors


def corpus_vectors(encode: Encode, encoder: Path, corpus: Path, texts: list[str]) -> Tensor:
    """The vectors of a corpus, (N, D), of length 1: those of the last search if they still hold."""
    kept, sources = Path(f"{corpus}.vectors.npz"), [file_sha256(corpus), encoder_sha256(encoder)]
    with suppress(Exception), np.load(kept) as found:             # none there, or damaged
        if found["sources"].tolist() == sources:
            return torch.from_numpy(found["vectors"])
    vectors = F.normalize(encode_all(encode, texts), dim=-1)
    try:
        write_vectors(kept, vectors, sources=sources)
    except OSError as error:
        complain(f"NOTICE: the next search has to encode again: {error}")
    return vectors


def nearest(vectors: Tensor, queries: Tensor, k: int) -> Iterator[tuple[list[float], list[int]]]:
    """Of each query, the k highest cosines and their rows, the nearest first: (N, D), (Q, D)."""
    for some in F.normalize(queries, dim=-1).split(64):           # 64 x N cosines exist at a time
        cosines, rows = (some @ vectors.mT).topk(min(k, len(vectors)))              # (64, K)s
        yield from zip(cosines.tolist(), rows.tolist())


def sentence(text: str) -> str:
    """An argument that is a sentence; Python reads a byte that is no UTF-8 as a surrogate."""
    if not text.strip() or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise argparse.ArgumentTypeError(f"expected a sentence in UTF-8, found {text!a}")
    return text


def main(argv: list[str] | None = None) -> None:
    top = Parser(prog="search.py", description="Find the sentences that are most like a query.")
    top.add_argument("encoder", help="a folder, a Hub id, or mini")
    top.add_argument("corpus", type=Path, nargs="?", help="text file, one sentence a line (or .gz)")
    top.add_argument("query", type=sentence, nargs="*", help="sentence to look for, or several")
    top.add_argument("--queries", type=Path, metavar="FILE", help="file with a query on each line")
    top.add_argument("--top", type=count, default=5, metavar="K", help="sentences to find [5]")
    top.add_argument("--similarity", type=sentence, nargs=2, metavar="SENTENCE",
                     help="two sentences, whose cosine is printed")
    top.add_argument("--device", default="auto", help="processor: auto, cpu, cuda, mps [auto]")
    args = top.parse_args(argv)
    if bool(args.similarity) == bool(args.corpus and (args.query or args.queries)):
        top.error("expected a corpus and a query, or a corpus and --queries, or --similarity")
    encode, encoder = open_encode(args)
    if args.similarity:
        return print(f"{F.cosine_similarity(*encode(args.similarity).split(1)).item():.4f}")
    with exits(3):
        lines = [(i, text) for i, text in enumerate(read_texts(args.corpus), start=1) if text]
        queries = args.query + [*filter(None, read_texts(args.queries) if args.queries else [])]
        vectors = corpus_vectors(encode, encoder, args.corpus, [text for _, text in lines])
    for query, found in zip(queries, nearest(vectors, encode(queries), args.top)):
        print(query)
        for cosine, row in zip(*found):
            print(f"{cosine:.4f}", *lines[row], sep="\t")


if __name__ == "__main__":
    sys.exit(program(main))

"""
Where do sentences come from, and how do they become batches of tokens?

    read_corpus(name)            a Corpus: one to three columns of text, row by row
        docs                     built in: English from docstrings on this machine (docs.py)
        wiki1m, nli, ...         a local folder is looked into first, then the Hugging Face Hub
        FILE.txt                 one sentence a line; a blank line separates documents
        FILE.csv, .tsv, .jsonl   two columns (sentence, positive) or three (and a hard negative)
        -                        standard input
    Tokenizer.read(folder)       texts -> ids and mask, both (B, T); inputs of a masked LM
    batches, ahead               row numbers in random order; work done early

Files may be gzipped. A damaged file is refused with the place of the damage; only blank lines are
skipped, and these are counted. `batches` deals in row numbers, so a method may look up whatever
else it knows about a row.
Not here: views of a row (papers/), test sets (eval_sts.py), finding files (engine/hub.py).
"""

import hashlib
import random
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from engine.columns import (NOTHING, TEXTS, advice, kind_of, no_text, own_file, split_rows,
                            text_places)
from engine.docs import doc_sentences
from engine.doctor import look_at_columns
from engine.hub import data_file, file_sha256
from engine.layouts import wrong
from engine.texts import Lines, read_lines
from engine.tokenizer_files import tokenizer_json

# Our name of a corpus -> the names its file may have in a data folder.
CORPORA = {
    "wiki1m": ["wiki1m.txt", "wiki1m.txt.gz", "wiki1m_for_simcse.txt"],
    "nli": ["nli/*.csv", "nli/*.csv.gz", "nli_for_simcse.csv"],
    "wiki_docs": ["wiki_docs.txt", "wiki_docs.txt.gz"],
    "wiki_articles": ["wiki_articles.txt", "wiki_articles.txt.gz"],
    "reviews": ["reviews.txt", "reviews.txt.gz"],
}


@dataclass(frozen=True)
class Corpus:
    """N rows of text: sentences, pairs (anchor, positive), or triples with a hard negative."""
    name: str
    columns: list[Sequence[str]]        # 1, 2 or 3 of N texts
    documents: Sequence[int] | None     # the number of each row's document, where the file tells
    sha256: str                         # of the file as it lies on the disk, or of the lines
    blank: int                          # lines left out because a text was missing
    whole: "Corpus | None" = None       # the corpus that these rows are a part of, if they are

    def __len__(self) -> int:
        return len(self.columns[0])

    def part(self, rows: Sequence[int]) -> "Corpus":
        """Some rows, as a corpus of their own."""
        rows = list(rows)
        return replace(self, columns=[[column[row] for row in rows] for column in self.columns],
                       documents=[self.documents[row] for row in rows] if self.documents else None,
                       whole=self.whole or self)


def read_corpus(name: str, data: Path | None = None) -> Corpus:
    """A corpus by its name, from the data folder or the Hub, or from a file of one's own."""
    if name == "docs":
        sentences = doc_sentences()
        digest = hashlib.sha256("\n".join(sentences).encode()).hexdigest()
        return Corpus(name, [sentences], None, digest, blank=0)
    path = (data_file(CORPORA[name], data) if name in CORPORA else
            own_file(name, f"a file or one of docs, {', '.join(CORPORA)}"))
    kind = kind_of(path, ["txt", "csv", "tsv", "jsonl"])
    columns, documents, blank = read_sentences(path) if kind == "txt" else read_rows(path, kind)
    if len(columns[0]) < 2:
        whole = " of lines that end in \\r alone" if "\r" in "".join(columns[0]) else ""
        raise ValueError(f"{path}: expected two rows or more, as other rows are the negatives, "
                         f"found {len(columns[0])}{whole}")
    look_at_columns(path, kind, columns)
    return Corpus(name, columns, documents, file_sha256(path), blank)


def read_sentences(path: Path) -> tuple[list[Lines], array | None, int]:
    """One sentence a line. A blank line between two sentences begins a new document."""
    sentences, documents = Lines(), array("i")
    blank, document, ended = 0, 0, False
    for line in read_lines(path):
        if sentence := line.strip():
            document += ended
            sentences.append(sentence)
            documents.append(document)
            ended = False
        else:
            blank += 1
            ended = bool(sentences)
    return [sentences], documents if document else None, blank


def read_rows(path: Path, kind: str) -> tuple[list[Lines], None, int]:
    """Two or three texts a row, or as many as a header of usual names (engine/columns.py) has."""
    columns, blank, width, places, lacking = [Lines() for _ in TEXTS], 0, 0, [], []
    for number, row in split_rows(path, kind):
        row = [text.strip() for text in row]
        if not any(row):
            blank += 1
            continue
        if not width:
            width, places = len(row), text_places(path, kind, row)
            if places:
                continue
        if len(row) != width or not places and width not in (2, 3):
            expected = width if places or columns[0] else "2 or 3"
            raise ValueError(f"{path}:{number}: expected {expected} columns, found {len(row)}" + (
                advice(kind, row, width if columns[0] or places else 3)
                or "; one text a line is a .txt" * (len(row) == 1)))
        if places:
            row = [row[place] for place in places]
        if not all(row):
            blank, lacking = blank + 1, row
        else:
            for column, text in zip(columns, row):
                column.append(text)
    if lacking and not columns[0]:
        raise ValueError(no_text(path, lacking.index(""), NOTHING, ""))
    return columns[: len(places) or width or 3], None, blank


class Tokenizer:
    """Texts to token ids, by the rules of a tokenizer.json.

    The library's object holds the limit as a setting, and one thread may make batches while another
    evaluates: so each limit has a copy of its own.
    """

    def __init__(self, json: str):
        self.json, self.limited = json, {}
        self.whole = self.copy(None)
        ids = self.whole.get_vocab()
        self.pad_id = ids.get("[PAD]", ids.get("<pad>"))
        self.mask_id = ids.get("[MASK]", ids.get("<mask>"))
        if self.pad_id is None:
            raise ValueError("it has no token [PAD] or <pad>")
        added = self.whole.get_added_tokens_decoder()
        self.whole.encode("q" * 200)              # raises where unknown words have no token
        self.special_ids = torch.tensor(sorted({i for i, token in added.items() if token.special}
                                               | set(self.whole.encode("").ids)))
        self.vocab_size = self.whole.get_vocab_size()

    @classmethod
    def read(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of an encoder's folder, which puts [CLS] before a text and [SEP] after."""
        rules = tokenizer_json(Path(folder))
        try:
            made = cls(rules)
        except Exception as error:      # the library raises bare Exception for what it cannot parse
            raise ValueError(f"{folder}: expected a tokenizer of Hugging Face's: {error}") from None
        if len(made.whole.encode("").ids) != 2:
            raise wrong(folder, "a tokenizer.json that puts [CLS] before a text and [SEP] after it",
                        "a post_processor that does not")
        return made

    def copy(self, max_tokens: int | None) -> tokenizers.Tokenizer:
        """The library's tokenizer with this limit, whatever limit the file asks for."""
        copy = tokenizers.Tokenizer.from_str(self.json)
        copy.no_padding()
        copy.no_truncation()
        if max_tokens is not None:
            copy.enable_truncation(max_tokens)
        return copy

    @property
    def cased(self) -> bool:
        """Does it tell "Paris" from "paris"? The names of encoders do not say."""
        return self.whole.encode("Paris").ids != self.whole.encode("paris").ids

    def __call__(self, texts: Sequence[str], *, max_tokens: int) -> tuple[Tensor, Tensor]:
        """Ids, padded to the longest text of the batch, and a mask of those that are real.

        Equal texts, such as the two views of SimCSE, are tokenized once.
        """
        if max_tokens not in self.limited:
            self.limited[max_tokens] = self.copy(max_tokens)
        row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        found = [each.ids for each in self.limited[max_tokens].encode_batch_fast([*row])]
        lengths = np.array([*map(len, found)])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, np.int64)
        ids[mask] = np.fromiter(chain(*found), np.int64)
        rows = [row[text] for text in texts]
        return torch.from_numpy(ids[rows]), torch.from_numpy(mask[rows])        # (B, T), (B, T)

    def special(self, ids: Tensor) -> Tensor:                     # (B, T) -> (B, T)
        """Where ids are [CLS], [SEP], padding and the like."""
        if self.special_ids.device != ids.device:                 # once: a copy halts the GPU
            self.special_ids = self.special_ids.to(ids.device)
        return torch.isin(ids, self.special_ids)

    def mask(self, ids: Tensor, *, rate: float, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of masked language modelling.         (B, T) -> (B, T), (B, T)

        Of the tokens chosen, 80 % become [MASK], 10 % any token, 10 % stay; labels are -100
        elsewhere. BERT (Devlin et al. 2019), section 3.1; SimCSE's code does the same.
        """
        draws = {"generator": torch.Generator(ids.device).manual_seed(seed), "device": ids.device}
        chance, fate = torch.rand(2, *ids.shape, **draws)
        chosen = (chance < rate) & ~self.special(ids)
        any_token = torch.randint(self.vocab_size, ids.shape, **draws)
        masked = torch.where(fate < 0.8, self.mask_id, torch.where(fate < 0.9, any_token, ids))
        return torch.where(chosen, masked, ids), ids.masked_fill(~chosen, -100)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has in full, [CLS] and [SEP] included."""
        return [len(row) for row in self.whole.encode_batch_fast(texts)]


def step_seed(seed: int, step: int) -> int:
    """The seed of dropout and token masks: no other state is needed to go on with a run exactly."""
    return seed * 1_000_003 + step


def batches(n: int, size: int, *, seed: int, epochs: int) -> Iterator[list[int]]:
    """Row numbers in random order, another one in each epoch, from seed and epoch alone.

    A ragged last batch is dropped: it would have fewer negatives, and so be an easier task. Nor are
    rows sorted by length to save padding: the others of a batch are the negatives, and should be
    any sentences, not those of equal length.
    """
    for epoch in range(epochs):
        order = shuffled(n, random.Random(f"{seed} {epoch}"))
        for _ in range(n // size):
            yield list(islice(order, size))


def row_order(plan: Iterable[tuple[int, Sequence[int]]], batch_size: int, *, seed: int
              ) -> Iterator[list[int]]:
    """The rows of every step of a plan, which is a list of (number of steps, their rows).

    Where the next entry of the plan has the same rows, their random order goes on.
    """
    for rows, entries in groupby(plan, key=itemgetter(1)):
        count = sum(count for count, _ in entries)
        epochs = -(-count // (len(rows) // batch_size))
        for places in islice(batches(len(rows), batch_size, seed=seed, epochs=epochs), count):
            yield [rows[place] for place in places]


def shuffled(n: int, rng: random.Random) -> Iterator[int]:
    """The numbers below n in random order, drawn one by one: ten million take 40 MB."""
    left = array("I", range(n))
    for last in reversed(range(n)):
        place = rng.randrange(last + 1)
        yield left[place]
        left[place] = left[last]


def ahead(items: Iterable, depth: int = 8) -> Iterator:
    """The same items in the same order, made up to `depth` early in a thread of their own."""
    source, end = iter(items), object()
    worker = ThreadPoolExecutor(max_workers=1)
    try:
        made = deque(worker.submit(next, source, end) for _ in range(depth))
        while (item := made.popleft().result()) is not end:
            made.append(worker.submit(next, source, end))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)

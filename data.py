"""
Where do sentences come from, and how do they become batches of tokens?

    read_corpus(name)            a Corpus: one to three columns of text, row by row
        docs                     built in: English from docstrings on this machine (docs.py)
        wiki1m, nli, ...         a local folder is looked into first, then the Hugging Face Hub
        FILE.txt                 one sentence a line; a blank line separates documents
        FILE.csv, FILE.tsv       two columns (sentence, positive) or three (and a hard negative)
    Tokenizer.read(folder)       texts -> ids and mask, both (B, T); inputs of a masked LM
    batches, ahead               row numbers in random order; work done early

Files may be gzipped. A damaged file is refused with the place of the damage; only blank lines are
skipped, and these are counted. `batches` deals in row numbers, so a method may look up whatever
else it knows about a row.
Not here: views of a row (papers/), test sets (eval_sts.py), finding files (engine/hub.py).
"""

import csv
import hashlib
import random
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from engine.docs import doc_sentences
from engine.hub import data_file, file_sha256
from engine.texts import Lines, read_lines

# Our name of a corpus -> the names its file may have in a data folder.
CORPORA = {
    "wiki1m": ["wiki1m.txt", "wiki1m.txt.gz", "wiki1m_for_simcse.txt"],
    "nli": ["nli/*.csv", "nli/*.csv.gz", "nli_for_simcse.csv"],
    "wiki_docs": ["wiki_docs.txt", "wiki_docs.txt.gz"],
    "wiki_articles": ["wiki_articles.txt", "wiki_articles.txt.gz"],
    "reviews": ["reviews.txt", "reviews.txt.gz"],
}
HEADER = ["sent0", "sent1", "hard_neg"]             # of the Hub's nli_for_simcse.csv


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
    path = data_file(CORPORA[name], data) if name in CORPORA else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a file or one of docs, {', '.join(CORPORA)}, "
                                f"found {'a folder' if path.is_dir() else 'nothing'} there")
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("txt", "csv", "tsv"):
        raise ValueError(f"{path}: expected a name in .txt, .csv or .tsv (.gz may follow)")
    columns, documents, blank = read_sentences(path) if kind == "txt" else read_rows(path, kind)
    if len(columns[0]) < 2:
        raise ValueError(f"{path}: expected two rows or more, as other rows are the negatives, "
                         f"found {len(columns[0])}")
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
    """Two or three texts a row; the names sent0, sent1, hard_neg in the first row are a header."""
    columns, blank, width = [Lines() for _ in HEADER], 0, None
    for number, row in split_rows(path, kind):
        row = [text.strip() for text in row]
        if not any(row):
            blank += 1
            continue
        width = width or len(row)
        if len(row) != width or width not in (2, 3):
            raise ValueError(f"{path}:{number}: expected {width if columns[0] else '2 or 3'} "
                             f"columns, found {len(row)}")
        if not all(row):
            blank += 1
        elif columns[0] or row != HEADER[:width]:
            for column, text in zip(columns, row):
                column.append(text)
    return columns[:width], None, blank


def split_rows(path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields. A .csv may quote a field; in a .tsv, quotes are ordinary letters."""
    if kind == "tsv":
        rows = (line.rstrip("\r\n").split("\t") for line in read_lines(path))
        return (yield from enumerate(rows, start=1))
    reader = csv.reader(read_lines(path), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: damaged csv ({error})") from None


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
        self.special_ids = sorted({i for i, token in added.items() if token.special}
                                  | set(self.whole.encode("").ids))
        self.vocab_size = self.whole.get_vocab_size()

    @classmethod
    def read(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of an encoder's folder."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected the encoder's tokenizer, found no such file")
        try:
            return cls(path.read_text(encoding="utf-8"))
        except Exception as error:      # the library raises bare Exception for what it cannot parse
            raise ValueError(f"{path}: expected a tokenizer of Hugging Face's: {error}") from None

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
        """Ids, padded to the longest text of the batch, and a mask of those that are real."""
        if max_tokens not in self.limited:
            self.limited[max_tokens] = self.copy(max_tokens)
        rows = [row.ids for row in self.limited[max_tokens].encode_batch_fast(texts)]
        lengths = torch.tensor([len(row) for row in rows])                      # (B,)
        longest = max(map(len, rows))
        padded = [row + [self.pad_id] * (longest - len(row)) for row in rows]
        return torch.tensor(padded), torch.arange(longest) < lengths[:, None]   # (B, T), (B, T)

    def special(self, ids: Tensor) -> Tensor:                     # (B, T) -> (B, T)
        """Where ids are [CLS], [SEP], padding and the like."""
        return torch.isin(ids, torch.tensor(self.special_ids, device=ids.device))

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

    A ragged last batch is dropped: it would have fewer negatives, and so be an easier task.
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

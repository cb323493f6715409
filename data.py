"""
Where do sentences come from, and how do they become batches of tokens?

    read_corpus(name)            a Corpus: one to three columns of text, row by row
        docs                     built in: English from docstrings on this machine (docs.py)
        wiki1m, nli, ...         a local folder is looked into first, then the Hugging Face Hub
        FILE.txt                 one sentence a line; a blank line separates documents
        FILE.csv, FILE.tsv       two columns (sentence, positive) or three (and a hard negative)
    doctor(corpus, ...)          what a corpus is like, before hours are spent on it
    Tokenizer.read(folder)       texts -> ids and mask, both (B, T)
    batches, ahead, mask_tokens  row numbers in random order; work done early; masked-LM inputs

Files may be gzipped. What is damaged is refused in one sentence that names the place: nothing is
skipped but blank lines, and these are counted. The row is the unit everywhere: `batches` deals
in row numbers, so a method may look up whatever else it knows about a row.

Not here: which texts of a row count as the same (positives.py), test sets (eval_sts.py).
"""

import csv
import gzip
import hashlib
import io
import lzma
import mmap
import os
import random
import tarfile
import tempfile
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import tokenizers
import torch
from torch import Tensor

from docs import doc_sentences

Item = TypeVar("Item")

# Our name of a corpus -> the names its file may have in a data folder.
CORPORA = {
    "wiki1m": ["wiki1m.txt", "wiki1m.txt.gz", "wiki1m_for_simcse.txt"],
    "nli": ["nli/*.csv", "nli/*.csv.gz", "nli_for_simcse.csv"],
    "wiki_docs": ["wiki_docs.txt", "wiki_docs.txt.gz"],
    "wiki_articles": ["wiki_articles.txt", "wiki_articles.txt.gz"],
    "reviews": ["reviews.txt", "reviews.txt.gz"],
}
HUB_DATASET = "princeton-nlp/datasets-for-simcse"
ON_THE_HUB = ["wiki1m_for_simcse.txt", "nli_for_simcse.csv", "senteval.tar"]
HEADER = ["sent0", "sent1", "hard_neg"]             # of the Hub's nli_for_simcse.csv

ENCODER_FILES = ["config.json", "tokenizer.json", "model.safetensors"]
ENCODER_EXTRAS = ["tokenizer_config.json", "modules.json", "sentence_bert_config.json",
                  "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]


# ---- reading a corpus -----------------------------------------------------------------------

class Lines(Sequence[str]):
    """Texts, first all added, then read: beyond a megabyte in a temporary file, mapped into memory.

    A list would take 170 bytes a sentence, so 1.7 GB for ten million; this takes 8, and the system
    drops from memory what is not in use.
    """
    in_memory = 1 << 20

    def __init__(self, texts: Iterable[str] = ()):
        self.file = tempfile.SpooledTemporaryFile(self.in_memory)
        self.ends = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        try:
            self.ends.append(self.ends[-1] + self.file.write(text.encode()))
        except OSError as error:
            raise OSError(f"{tempfile.gettempdir()}: no room for the texts of the corpus "
                          f"({error.strerror}): name another folder with TMPDIR") from None

    @cached_property
    def block(self) -> bytes | mmap.mmap:
        self.file.seek(0)                                           # flushes, too
        if self.ends[-1] <= self.in_memory:
            return self.file.read()
        return mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]                             # -1 is the last one
        return self.block[self.ends[place] : self.ends[place + 1]].decode()

    def __eq__(self, other) -> bool:
        return list(self) == list(other)


@dataclass(frozen=True)
class Corpus:
    """N rows of text: sentences, pairs (anchor, positive), or triples with a hard negative."""
    name: str
    columns: list[Sequence[str]]        # 1, 2 or 3 of N texts
    documents: Sequence[int] | None     # the number of each row's document, where the file tells
    sha256: str                         # of the file as it lies on the disk
    blank: int                          # lines left out because a text was missing
    teacher: Tensor | None = None       # (N, D) what another encoder makes of each row (teacher.py)

    def __len__(self) -> int:
        return len(self.columns[0])


def read_corpus(name: str, data: Path | None = None) -> Corpus:
    """A corpus by its name, from the data folder or the Hub, or from a file of one's own."""
    if name == "docs":
        return docs_corpus()
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


def docs_corpus() -> Corpus:
    """The built-in corpus; its sha256 is that of its lines, as there is no file."""
    sentences = doc_sentences()
    digest = hashlib.sha256("\n".join(sentences).encode()).hexdigest()
    return Corpus("docs", [sentences], None, digest, blank=0)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, gzipped or not. Only \\n ends one: texts hold U+2028 and such."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(io.BufferedReader(file), start=1):
                if b"\0" in line:
                    raise ValueError(f"{path}:{number}: expected UTF-8 text, found a NUL character")
                text = line.decode("utf-8")
                yield text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: expected UTF-8, found the byte "
                         f"{error.object[error.start]:#04x}; convert the file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip after line {number} ({error}); "
                         f"fetch the file again") from None


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
        for number, line in enumerate(read_lines(path), start=1):
            yield number, line.rstrip("\r\n").split("\t")
        return
    reader = csv.reader(read_lines(path), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: damaged csv ({error})") from None


def file_sha256(path: Path) -> str:
    """What `sha256sum FILE` prints."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- finding files: a local folder, else the Hub --------------------------------------------

def local_folder(data: Path | None) -> Path | None:
    """The folder given by --data, else by MINCSE_DATA, else none."""
    folder = data or (Path(os.environ["MINCSE_DATA"]) if os.environ.get("MINCSE_DATA") else None)
    if folder and not folder.is_dir():
        origin = "--data" if data else "MINCSE_DATA"
        raise FileNotFoundError(f"{folder}: {origin} names this folder, but it does not exist")
    return folder


def data_file(names: Sequence[str], data: Path | None) -> Path:
    """The first of these names in the local folder; else the one that the Hub has."""
    folder = local_folder(data)
    for name in names if folder else ():
        if found := sorted(folder.glob(name)):
            if len(found) > 1:
                raise ValueError(f"{folder / name}: expected one file, found {len(found)}; "
                                 f"name the one you mean with --corpus FILE")
            return found[0]
    remote = [name for name in names if name in ON_THE_HUB]
    if not remote:
        raise FileNotFoundError(f"{names[0]}: not on the Hub, and not in {folder or 'any folder'}; "
                                f"pass the one that has it with --data or MINCSE_DATA")
    return from_hub(remote[0])


def from_hub(name: str) -> Path:
    """A file of SimCSE's data set on the Hub, kept in the Hub client's own cache."""
    with hub_errors(f"{name} of {HUB_DATASET}", instead="--data FOLDER or MINCSE_DATA=FOLDER"):
        from huggingface_hub import hf_hub_download         # here: it is slow to import
        return Path(hf_hub_download(HUB_DATASET, name, repo_type="dataset"))


def encoder_folder(name: str) -> Path:
    """The folder of an encoder: `mini` beside this file, a folder of one's own, or a Hub id."""
    folder = Path(__file__).parent / "mini" if name == "mini" else Path(name)
    return folder if folder.is_dir() else encoder_from_hub(name)


def encoder_from_hub(name: str) -> Path:
    """The folder in the Hub client's cache that holds the encoder's files."""
    with hub_errors(f"the encoder {name}", instead="--encoder FOLDER"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        for file in ENCODER_FILES:
            path = Path(hf_hub_download(name, file))
        for file in ENCODER_EXTRAS:
            try:
                hf_hub_download(name, file)
            except LocalEntryNotFoundError:     # no connection: what the cache has is in the folder
                break
            except EntryNotFoundError:          # the encoder comes without this file
                continue
    return path.parent


@contextmanager
def hub_errors(what: str, *, instead: str) -> Iterator[None]:
    """One sentence for all that can go wrong between here and the Hub."""
    try:
        yield
    except Exception as error:                  # of three libraries, and other ones next year
        server = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise FileNotFoundError(
            f"{what}: not on this machine, and not to be had from the Hub at {server} ({reason}); "
            f"look at HF_ENDPOINT (the server), HF_HUB_OFFLINE (1: only its cache) and HF_TOKEN "
            f"(private files), or pass a local folder with {instead}") from error


def senteval_folder(data: Path | None) -> Path:
    """The folder with STS/ and SICK/: senteval/downstream here, else senteval.tar from the Hub."""
    folder = local_folder(data)
    if folder and (folder / "senteval" / "downstream").is_dir():
        return folder / "senteval" / "downstream"
    archive = from_hub("senteval.tar")
    unpacked = archive.parent / f"mincse-senteval-{file_sha256(archive)[:16]}"
    if not unpacked.is_dir():
        unpack(archive, unpacked)
    for sick in sorted(unpacked.rglob("SICK")):
        if (sick.parent / "STS").is_dir():
            return sick.parent
    raise ValueError(f"{archive}: expected folders STS and SICK side by side, found none")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack plain files only, all inside the folder, which appears when it is complete."""
    try:
        with tarfile.open(archive) as tar, \
                tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for member in tar.getmembers():
                path, plain = PurePosixPath(member.name), member.isfile() or member.isdir()
                if path.is_absolute() or ".." in path.parts or not plain:
                    raise ValueError(f"{archive}: expected plain files inside one folder, "
                                     f"found {member.name!r}; nothing was unpacked")
            inside = Path(temporary, "in")
            inside.mkdir()
            tar.extractall(inside, filter="data")
            os.rename(inside, folder)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, NotADirectoryError,
            IsADirectoryError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{archive}: damaged ({reason}); fetch the file again") from None


# ---- tokens ---------------------------------------------------------------------------------

class Tokenizer:
    """Texts to token ids, by the rules of a tokenizer.json.

    Truncation is a setting of the library's object, and a batch may be made in one thread while an
    evaluation runs in another: so each limit has a copy of its own, never changed once made.
    """

    def __init__(self, json: str):
        self.json, self.limited = json, {}
        self.whole = self.copy(None)
        self.pad_id = self.first_of("[PAD]", "<pad>")
        self.mask_id = self.first_of("[MASK]", "<mask>")
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
        """The library's tokenizer with a limit; all-MiniLM's file, for one, comes with another."""
        copy = tokenizers.Tokenizer.from_str(self.json)
        copy.no_padding()
        copy.no_truncation()
        if max_tokens is not None:
            copy.enable_truncation(max_tokens)
        return copy

    @property
    def cased(self) -> bool:
        """Does it tell "Paris" from "paris"? Asked of itself, since names of encoders mislead."""
        return self.whole.encode("Paris").ids != self.whole.encode("paris").ids

    def first_of(self, *tokens: str) -> int | None:
        known = (self.whole.token_to_id(token) for token in tokens)
        return next((i for i in known if i is not None), None)

    def __call__(self, texts: Sequence[str], *, max_tokens: int) -> tuple[Tensor, Tensor]:
        """Ids, padded to the longest text of the batch, and which of them are real."""
        if max_tokens not in self.limited:
            self.limited[max_tokens] = self.copy(max_tokens)
        rows = [row.ids for row in self.limited[max_tokens].encode_batch_fast(texts)]
        lengths = torch.tensor([len(row) for row in rows])                      # (B,)
        longest = max(map(len, rows))
        padded = [row + [self.pad_id] * (longest - len(row)) for row in rows]
        return torch.tensor(padded), torch.arange(longest) < lengths[:, None]   # (B, T), (B, T)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has in full, [CLS] and [SEP] included."""
        return [len(row) for row in self.whole.encode_batch_fast(texts)]


def mask_tokens(ids: Tensor, *, mask_id: int, special_ids: Sequence[int], vocab_size: int,
                rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and labels of masked language modelling.             (B, T) -> (B, T), (B, T)

    Of the tokens chosen, 80 % become [MASK], 10 % any token, 10 % stay; labels are -100 elsewhere.
    BERT (Devlin et al. 2019), section 3.1; SimCSE's code does the same.
    """
    chance, fate = torch.rand(2, *ids.shape, generator=generator, device=ids.device)
    chosen = (chance < rate) & ~torch.isin(ids, torch.tensor(special_ids, device=ids.device))
    any_token = torch.randint(vocab_size, ids.shape, generator=generator, device=ids.device)
    masked = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, any_token, ids))
    return torch.where(chosen, masked, ids), ids.masked_fill(~chosen, -100)


# ---- the doctor -----------------------------------------------------------------------------

def doctor(corpus: Corpus, tokenizer: Tokenizer, *, max_tokens: int) -> dict:
    """What a corpus is like. Tokens are counted in up to 10,000 evenly spaced rows."""
    n, size = len(corpus), min(len(corpus), 10_000)
    # 64 bits for each row are enough: two of ten million agree by chance once in 400,000 corpora.
    codes = np.fromiter(map(hash, zip(*corpus.columns)), np.int64, count=n)
    sample = [i * n // size for i in range(size)]
    counts = [tokenizer.lengths([column[i] for i in sample]) for column in corpus.columns]
    longest = [max(row) for row in zip(*counts)]
    return {
        "corpus": corpus.name,
        "rows": n,
        "columns": len(corpus.columns),
        "documents": corpus.documents[-1] + 1 if corpus.documents else None,
        "blank lines": corpus.blank,
        "exact duplicates": n - len(np.unique(codes)),
        "rows sampled": size,
        "max tokens": max_tokens,
        "share truncated": sum(length > max_tokens for length in longest) / size,
        "mean tokens": sum(map(sum, counts)) / (size * len(counts)),
        "sha256": corpus.sha256,
    }


def doctor_lines(report: dict) -> list[str]:
    """The doctor's report for the screen."""
    documents = f" in {report['documents']:,} documents" if report["documents"] else ""
    sampled = report["rows sampled"] < report["rows"]
    return [
        f"corpus {report['corpus']}: {report['rows']:,} rows x {report['columns']}{documents}",
        f"  left out: {report['blank lines']:,} blank lines; "
        f"kept: {report['exact duplicates']:,} exact duplicates",
        f"  {report['mean tokens']:.1f} tokens a text, {report['share truncated']:.1%} of rows cut "
        f"at {report['max tokens']}"
        + (f" (in {report['rows sampled']:,} evenly spaced rows)" if sampled else ""),
        f"  sha256 {report['sha256']}",
    ]


# ---- batches --------------------------------------------------------------------------------

def batches(n: int, size: int, *, seed: int, epochs: int) -> Iterator[list[int]]:
    """Row numbers in random order, new in each epoch, from seed and epoch alone.

    A ragged last batch is dropped: it would have fewer negatives, and so be an easier task.
    """
    for epoch in range(epochs):
        order = shuffled(n, random.Random(f"{seed} {epoch}"))
        for _ in range(n // size):
            yield list(islice(order, size))


def shuffled(n: int, rng: random.Random) -> Iterator[int]:
    """The numbers below n in random order, drawn one by one: ten million take 40 MB."""
    left = array("I", range(n))
    for last in reversed(range(n)):
        place = rng.randrange(last + 1)
        yield left[place]
        left[place] = left[last]


def ahead(items: Iterable[Item], depth: int = 8) -> Iterator[Item]:
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

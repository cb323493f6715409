"""
What does a teacher know? The vectors of another encoder: a row for each row of the corpus.

    read_teacher(name, corpus, device)    from a file, or made by an encoder at once
    write_teacher(encoder, corpus, path)  makes such a file, so that many runs can share it:

python -c "import teacher; teacher.write_teacher('roberta-base', 'wiki1m', 'teacher.safetensors')"

A file is a .safetensors with a tensor `embeddings`, or a .npy, (N, D) in float16 or float32: row i
is that of row i of the corpus as data.py reads it, without the blank lines. Nothing in a vector
tells whose it is, so a .safetensors also carries the sha256 of the sentences, and it is compared.
Not here: what is learned from the vectors (methods.py).
"""

import hashlib
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import data
from eval_sts import open_encoder, pick_device
from model import encode

AT_ONCE = 4096                        # rows that are made or checked together


def read_teacher(name: str, corpus: data.Corpus, device: torch.device) -> Tensor:     # (N, D)
    """The rows of a file, checked against the corpus, or those that the named encoder makes."""
    path = Path(name)
    if path.suffix in (".npy", ".safetensors") and not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of vectors, found nothing there; how an "
                                "encoder makes one is said at the top of teacher.py")
    rows = (read_npy(path) if path.suffix == ".npy" else
            read_safetensors(path, corpus) if path.suffix == ".safetensors" else
            teacher_rows(name, corpus, device))
    check_rows(name, rows, len(corpus))
    return rows


def teacher_rows(encoder: str, corpus: data.Corpus, device: torch.device) -> Tensor:  # (N, D)
    """The encoder as its folder describes it, over the first column: float16, half the memory."""
    model, tokenizer = open_encoder(data.encoder_folder(encoder))
    model.to(device)
    sentences, rows = corpus.columns[0], []
    with tqdm(total=len(sentences), desc="teacher", unit="row", disable=None) as bar:
        for start in range(0, len(sentences), AT_ONCE):
            rows.append(encode(model, tokenizer, sentences[start : start + AT_ONCE]).half())
            bar.update(len(rows[-1]))
    return torch.cat(rows)


def write_teacher(encoder: str, corpus: str, path: str) -> None:
    """Encode a corpus (its name or file) once and for all; the file knows encoder and sentences."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name in .safetensors, which can say what it is of")
    read = data.read_corpus(corpus)
    rows = teacher_rows(encoder, read, pick_device("auto"))
    save_file({"embeddings": rows}, path,
              metadata={"encoder": encoder, "corpus": corpus, "sha256": sentences_sha256(read)})


def sentences_sha256(corpus: data.Corpus) -> str:
    """Of the sentences in their order: a gzipped copy of a corpus has the same."""
    digest = hashlib.sha256()
    for row, sentence in enumerate(corpus.columns[0]):
        digest.update(("\n" * (row > 0) + sentence).encode())
    return digest.hexdigest()


def read_npy(path: Path) -> Tensor:                               # -> (N, D)
    """Left on the disk until a row is asked for; never unpickles."""
    try:
        return torch.from_numpy(numpy.load(path, mmap_mode="c"))
    except Exception as error:          # numpy parses the header as Python and lets much through
        raise ValueError(f"{path}: expected an array of numbers as numpy.save writes it, found "
                         f"something else ({str(error)[:80]})") from None


def read_safetensors(path: Path, corpus: data.Corpus) -> Tensor:  # -> (N, D)
    """The tensor `embeddings`, if it was made from these very sentences or does not say."""
    try:
        with safe_open(path, framework="pt") as file:
            found, made_of = list(file.keys()), file.metadata() or {}
            rows = file.get_tensor("embeddings") if "embeddings" in found else None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged safetensors file ({str(error)[:80]})") from None
    if rows is None:
        raise ValueError(f"{path}: expected a tensor called embeddings, found {found[:3]}")
    if made_of.get("sha256", "") not in ("", sentences_sha256(corpus)):
        raise ValueError(f"{path}: made from {made_of.get('corpus', 'other sentences')}, whose "
                         f"sentences are not those of {corpus.name}: row i would not be that of "
                         "sentence i; write the file again")
    return rows


def check_rows(name: str, rows: Tensor, expected: int) -> None:
    """A row per sentence, each with a direction."""
    if rows.ndim != 2 or len(rows) != expected or rows.dtype not in (torch.float16, torch.float32):
        raise ValueError(f"{name}: expected ({expected}, D) in float16 or float32, a row for each "
                         f"of the corpus, found {tuple(rows.shape)} in {str(rows.dtype)[6:]}")
    for start in range(0, expected, AT_ONCE):
        length = rows[start : start + AT_ONCE].float().norm(dim=1)                  # (AT_ONCE,)
        broken = (~(length.isfinite() & (length > 0))).nonzero()                    # (X, 1)
        if len(broken):
            raise ValueError(f"{name}: row {start + broken[0].item()}, counted from 0, is zero or "
                             "not finite and has no direction")

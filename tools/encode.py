"""
What are the vectors of my sentences?

    python -m tools.encode runs/mine sentences.txt vectors.npy       # or .npz, .safetensors

N lines make (N, D) in float32: row i is of line i, both counted from 0, and a blank line has a row,
too. Vectors keep the length that the model gives them. In Python, with model.py and eval_sts.py:

    encode(*open_encoder("runs/mine"), ["A man plays a guitar."])
"""

if __name__ == "__main__":
    import engine.interrupt           # noqa: F401  first: Ctrl-C while torch is imported

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.files import replacing, write
from engine.flags import Parser, exits, pick_device, program
from engine.hub import encoder_folder
from engine.texts import read_lines
from eval_sts import Encode, open_encoder
from model import encode

FORMATS = (".npy", ".npz", ".safetensors")


def read_texts(path: Path) -> list[str]:
    """The lines of a text file, blank ones too; a table is refused: its lines are no sentences."""
    table = path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv", ".jsonl", ".parquet"))
    texts = [] if table or not path.is_file() else [line.strip() for line in read_lines(path)]
    if not any(texts):
        found = "a table" if table else "no text" if path.is_file() else "no file"
        raise ValueError(f"{path}: expected a text file with one sentence a line, found {found}")
    return texts


def open_encode(args) -> tuple[Encode, Path]:
    """The function N sentences -> (N, D) of the encoder asked for, and the encoder's folder."""
    with exits(2):
        device = pick_device(args.device)
    with exits(3):
        model, tokenizer = open_encoder(folder := encoder_folder(args.encoder))
    return partial(encode, model.to(device), tokenizer), folder


def encode_all(encode: Encode, texts: list[str], *, chunk: int = 8192) -> Tensor:   # -> (N, D)
    """The vectors of many texts, with a bar on the screen."""
    starts = tqdm(range(0, len(texts), chunk), disable=None, desc="encode", unit="chunk")
    return torch.cat([encode(texts[start : start + chunk]) for start in starts])


def write_vectors(path: Path, vectors: Tensor, **more: list[str]) -> None:          # (N, D)
    """Write vectors in the format of the file's name; `more` goes into an .npz only."""
    if path.suffix == ".safetensors":
        return write(path, {"vectors": vectors})
    with replacing(path) as fresh, fresh.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, vectors)
        else:
            np.savez(file, vectors=vectors, **more)


def main(argv: list[str] | None = None) -> None:
    top = Parser(prog="encode.py", description="Write the vectors of sentences.")
    top.add_argument("encoder", help="a folder, a Hub id, or mini")
    top.add_argument("sentences", type=Path, help="text file, one sentence a line (or .gz)")
    top.add_argument("vectors", type=Path, help=f"file to write, in {', '.join(FORMATS)}")
    top.add_argument("--device", default="auto", help="processor: auto, cpu, cuda, mps [auto]")
    args = top.parse_args(argv)
    if args.vectors.suffix not in FORMATS or not args.vectors.parent.is_dir():
        top.error(f"{args.vectors}: expected a name in {', '.join(FORMATS)} in an existing folder")
    with exits(3):
        texts = read_texts(args.sentences)
    vectors = encode_all(open_encode(args)[0], texts)
    write_vectors(args.vectors, vectors)
    print(f"{args.vectors}: {len(texts)} vectors of width {vectors.shape[1]}, "
          f"{texts.count('')} of blank lines")


if __name__ == "__main__":
    sys.exit(program(main))
